"""Every shipped recipe is read strictly, written back whole, agrees with every shipped DeepSpeed file, and builds.

New YAML files in launch/recipes are picked up by themselves. Where a recipe's weights are not on this machine, all else is checked.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from data_prep.sources import SOURCES
from vltrain.config import Config
from vltrain.data.conversation import TEMPLATES
from vltrain.data.tokenizer import load_tokenizer
from vltrain.evaluate.report import SCORERS
from vltrain.models.adapters import ADAPTERS
from vltrain.models.build import build_model, count_parameters
from vltrain.recipe import dump_config, read_recipe
from vltrain.settings import load_settings
from vltrain.train.ds_config import load_ds_json, resolve_ds_config

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
DS_FILES = sorted((ROOT / "ds_configs").glob("*.json"))
every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def config_of(path: Path) -> Config:
    return load_settings(["--recipe", str(path)], program="test").config


def is_here(source: str | None) -> bool:
    """Whether weights are on this machine: a folder, a file, an asset, or a file of an installed package."""
    if source is None or source.startswith("asset://"):
        return True
    if source.startswith("package://"):
        return importlib.util.find_spec(source.removeprefix("package://").split("/")[0]) is not None
    return (ROOT / source).exists()


@every_recipe
def test_a_recipe_names_what_exists(path: Path) -> None:
    config = config_of(path)
    assert config.model.adapter.kind in ADAPTERS and config.data.template in TEMPLATES
    assert config.data.source in SOURCES and config.eval.scorer in SCORERS
    assert Path(config.output).name == path.stem  # two recipes never write into one folder


@every_recipe
def test_a_recipe_comes_back_from_its_resolved_form(path: Path, tmp_path: Path) -> None:
    config = config_of(path)
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert config_of(tmp_path / "resolved.yaml") == config


@every_recipe
@pytest.mark.parametrize("ds", DS_FILES, ids=lambda ds: ds.stem)
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_a_recipe_agrees_with_every_deepspeed_file(path: Path, ds: Path, world_size: int) -> None:
    config = config_of(path)
    resolved = resolve_ds_config(load_ds_json(ds), config, world_size)
    assert resolved["train_micro_batch_size_per_gpu"] == 1
    assert resolved["gradient_accumulation_steps"] * world_size >= config.train.packs_per_step
    assert resolved["gradient_clipping"] == config.optim.clip
    assert '"auto"' not in json.dumps(resolved)


@every_recipe
def test_a_recipes_model_builds(path: Path) -> None:
    """On the meta device: shapes alone, at any size."""
    model = config_of(path).model
    sources = (model.vision.source, model.llm.source, model.llm.tokenizer)
    absent = [source for source in sources if not is_here(source)]
    if absent:
        pytest.skip(f"not on this machine: {', '.join(absent)}")
    built = build_model(model, device="meta")
    assert load_tokenizer(model.llm.tokenizer or model.llm.source).vocab_size <= built.llm.config.vocab_size
    assert built.visual_tokens >= 1


def test_the_named_recipes_are_there() -> None:
    assert {path.stem for path in RECIPES} >= {"quickstart", "smollm2_easyvqa", "llama2_7b_diht_scienceqa"}
    assert DS_FILES


def hollow(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors of those shapes with one number behind each, so that files of 7 billion weights stay small."""
    return {name: torch.zeros((), dtype=torch.float16).expand(shape) for name, shape in shapes.items()}


def llama_shapes(width: int, ffn: int, layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes = {"tok_embeddings.weight": (vocabulary, width), "output.weight": (vocabulary, width), "norm.weight": (width,)}
    block = {f"attention.w{name}": (width, width) for name in "qkvo"} | {"attention_norm": (width,), "ffn_norm": (width,)}
    block |= {"feed_forward.w1": (ffn, width), "feed_forward.w2": (width, ffn), "feed_forward.w3": (ffn, width)}
    return shapes | {f"layers.{layer}.{name}.weight": shape for layer in range(layers) for name, shape in block.items()}


def vit_shapes(width: int, layers: int, patch: int, positions: int) -> dict[str, tuple[int, ...]]:
    shapes = {"conv1.weight": (width, 3, patch, patch), "class_embedding": (width,), "positional_embedding": (positions, width)}
    matrices = {"attn.in_proj_": (3 * width, width), "attn.out_proj.": (width, width), "mlp.c_fc.": (4 * width, width)}
    matrices["mlp.c_proj."] = (width, 4 * width)
    block = {f"{name}weight": shape for name, shape in matrices.items()} | {f"{name}bias": shape[:1] for name, shape in matrices.items()}
    block |= {f"ln_{number}.{leaf}": (width,) for number in (1, 2) for leaf in ("weight", "bias")}
    shapes |= {f"ln_{place}.{leaf}": (width,) for place in ("pre", "post") for leaf in ("weight", "bias")}
    shapes |= {f"transformer.resblocks.{layer}.{name}": shape for layer in range(layers) for name, shape in block.items()}
    return {f"visual.{name}": shape for name, shape in shapes.items()}


def test_the_papers_recipe_trains_the_papers_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From files of LLaMA-2-7B's and DiHT's layout and sizes, where the recipe looks for them: 4,559,872, 6 visual tokens, 336 px."""
    llama = tmp_path / "weights" / "llama-2-7b"
    llama.mkdir(parents=True)
    params = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1}
    (llama / "params.json").write_text(json.dumps(params))
    torch.save(hollow(llama_shapes(4096, 11008, 32, 32000)), llama / "consolidated.00.pth")
    torch.save(hollow(vit_shapes(1024, 24, 14, 577)), tmp_path / "weights" / "diht_vitl14_336px.ckpt")
    monkeypatch.chdir(tmp_path)
    config = config_of(ROOT / "launch" / "recipes" / "llama2_7b_diht_scienceqa.yaml")
    model = build_model(config.model, device="meta")
    total, trained = (sum(counts) for counts in zip(*count_parameters(model).values(), strict=True))
    assert (model.visual_tokens, model.image_size, trained) == (6, 336, 4_559_872)
    assert 6_738_415_616 + 303_000_000 < total < 6_738_415_616 + 310_000_000
    assert model.vision.clip.config.hidden_act == "gelu"


def test_the_papers_optimisation() -> None:
    config = config_of(ROOT / "launch" / "recipes" / "llama2_7b_diht_scienceqa.yaml")
    given = read_recipe(ROOT / "launch" / "recipes" / "llama2_7b_diht_scienceqa.yaml")
    assert config.optim.lr == pytest.approx(0.009 * 32 / 256)
    assert (config.optim.betas, config.optim.weight_decay, config.optim.warmup_epochs, config.optim.clip) == ((0.9, 0.95), 0.02, 2, 0)
    assert (config.train.epochs, config.eval.temperature, config.eval.top_p, config.eval.max_new_tokens) == (20, 0.1, 0.75, 64)
    assert given["data.options"] == {"prompt_format": "QCM-ALE"}
    assert 28 <= config.train.packs_per_step * config.data.pack_length / 322 <= 36  # questions of 322 tokens, measured
