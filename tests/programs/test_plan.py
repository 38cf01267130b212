"""`vltrain plan` at full size, on a machine without the weights, and its mistakes: one line and exit code 2, nothing
written."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.blip import QUERIES, blip_config, make_tokenizers
from tests.support.tiny import SETTINGS, VISUAL_TOKENS, make_segments, write_packs
from vltrain.config.command_line import load_settings
from vltrain.config.recipe import dump_config
from vltrain.config.schema import Config
from vltrain.data.text.encoder import TemplateEncoder
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.data.text.tokenizer_sources import tokenizer_sources
from vltrain.memory import plan as memory_plan
from vltrain.memory.plan import GIB, parameters_by_part
from vltrain.memory.rehearse import Activations, PackSize
from vltrain.memory.sizes import assume_sizes
from vltrain.models.build import build_model
from vltrain.models.instructblip.sizes import BLIPS
from vltrain.prepared.ensure_data import ensure_packs, packed_folder
from vltrain.programs.plan import describe, main
from vltrain.shipped import find_recipe

ROOT = Path(__file__).parents[2]
PAPER = "llama2_7b_diht_scienceqa"
ROUTER = ["--model.adapter.kind", "router", "--model.adapter.dim", "8", "--model.adapter.groups", "2"]


def planned(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json", str(tmp_path / "plan.json")]) == 0
    return json.loads((tmp_path / "plan.json").read_text())


@pytest.fixture
def one_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan runs the model with checkpointing and without, of which it counts the recipe's own. Of large models only
    that one is run here; of small ones both (below, and tests/memory)."""
    rehearse, done = memory_plan._rehearse, {}

    def once(config: Config, pack: PackSize, *others: Any, checkpointing: bool) -> Activations:
        del checkpointing
        key = str((config.model, pack))
        if key not in done:
            done[key] = rehearse(config, pack, *others, checkpointing=config.train.activation_checkpointing)
        return done[key]

    monkeypatch.setattr(memory_plan, "_rehearse", once)


@pytest.mark.usefixtures("one_rehearsal")
def test_the_papers_recipe_without_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, ds = str(ROOT / "launch" / "recipes" / f"{PAPER}.yaml"), str(ROOT / "ds_configs" / "zero2.json")
    plan = planned(tmp_path, recipe, "--ds", ds, "--gpus", "8")
    parts = {part: count["trainable"] for part, count in plan["parameters"].items()}
    assert parts == {
        "adapter": 3_892_096,
        "peft": 0,
        "neck": 659_584,
        "modality": 8_192,
        "vision": 0,
        "llm": 0,
        "all": 4_559_872,
    }
    assert plan["parameters"]["llm"]["total"] == 6_738_415_616
    held = plan["memory_per_rank"]["held_bytes"]
    assert held["frozen weights, bf16"] == 2 * (plan["parameters"]["all"]["total"] - 4_559_872)
    assert plan["memory_per_rank"]["at_work_bytes"]["reduce buckets"] == 2 * 4 * 4_559_872
    assert held["optimizer states"] == pytest.approx(8 * 4_559_872 / 8, rel=1e-4)
    assert plan["disk"]["checkpoint_bytes"] == 12 * 4_559_872
    assert [card["verdict"] for card in plan["cards"].values()] == ["fits"] * 4
    said = capsys.readouterr().out
    assert "weights/llama-2-7b" in said and "sizes of llama-2-7b" in said and "sizes of vit-l/14-336" in said


def test_what_only_a_gpu_can_do_is_planned_anywhere(tmp_path: Path) -> None:
    """A login node has no GPU, and the jobs that are planned there do."""
    choices = [
        "--model.llm.attention",
        "flash_attention_2",
        "--model.llm.kernels",
        "liger",
        "--model.adapter.impl",
        "triton",
    ]
    plain, chosen = (planned(tmp_path, "quickstart", *changes)["memory_per_rank"] for changes in ([], choices))
    assert chosen["held_bytes"] == plain["held_bytes"]
    assert chosen["peak_bytes"] < plain["peak_bytes"], "the fused kernel keeps no norm's output"


@pytest.mark.parametrize(
    ("changes", "llm", "trained"),
    [
        (["--model.adapter.down_groups", "2"], None, 3_314_688),
        (["--model.adapter.vision", "both"], None, 4_559_872 + 614_784),
        (ROUTER, None, 3_781_296),
        ([*ROUTER, "--model.adapter.temperature", "5"], "llama-13b", 5_390_080),
    ],
)  # fmt: skip
def test_published_counts_of_trained_parameters(changes: list[str], llm: str | None, trained: int) -> None:
    config = load_settings(["--recipe", str(find_recipe(PAPER)), *changes], program="test").config
    model, _ = assume_sizes(config.model, llm=llm)
    assert parameters_by_part(build_model(model, device="meta"))["all"]["trainable"] == trained


@pytest.mark.usefixtures("one_rehearsal")
@pytest.mark.slow
def test_adapters_on_four_bits_on_one_gpu(tmp_path: Path) -> None:
    """LaVIN reports 9 GB for its lite run, with batches of short samples; with its own 512 tokens the plan stays
    below."""
    plan = planned(tmp_path, PAPER, "--model.bits", "4", "--data.pack_length", "512", "--data.max_images", "1")
    held = plan["memory_per_rank"]["held_bytes"]
    assert held["frozen weights, 4-bit"] == pytest.approx(
        0.5159 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 24 * 12 * 1024**2), rel=1e-3
    )
    assert 4 * GIB < plan["memory_per_rank"]["peak_bytes"] < 9 * GIB


@pytest.mark.usefixtures("one_rehearsal")
@pytest.mark.slow
def test_everything_tuned_on_eight_gpus(tmp_path: Path) -> None:
    """20 bytes a parameter are cut up: weights twice, gradients and both averages, each fp32."""
    plan = planned(
        tmp_path, PAPER, "--model.tune", "full", "--ds", str(ROOT / "ds_configs" / "zero3.json"), "--gpus", "8"
    )
    held, trained = plan["memory_per_rank"]["held_bytes"], plan["parameters"]["all"]["trainable"]
    assert trained == plan["parameters"]["all"]["total"] - 2 * 1024  # the ViT's final norm is not used
    cut_up = sum(held[kind] for kind in ("trained weights", "master weights", "optimizer states", "gradients"))
    assert cut_up == pytest.approx(20 * trained / 8, rel=1e-4)
    assert plan["cards"]["24 GB"]["verdict"] == "too small" and plan["cards"]["141 GB"]["verdict"] == "fits"
    beside, total = plan["zero_2"], plan["parameters"]["all"]["total"]
    assert beside["gathered_bytes_per_micro_step"] == pytest.approx(2 * 4 * total * 7 / 8, rel=1e-4)
    assert beside["peak_gib"] > plan["memory_per_rank"]["peak_gib"] and beside["cards"]["24 GB"] == "too small"
    advice = next(line for line in describe(plan).splitlines() if line.startswith("peak with ZeRO-2"))
    assert advice.endswith("the better choice where it fits"), "it needs a larger card"


@pytest.mark.usefixtures("one_rehearsal")
@pytest.mark.slow
def test_zero_2_is_named_where_it_fits_the_same_cards(tmp_path: Path) -> None:
    plan = planned(tmp_path, PAPER, "--ds", str(ROOT / "ds_configs" / "zero3.json"), "--gpus", "8")
    assert set(plan["zero_2"]["cards"].values()) == {"fits"}
    assert "GiB: the better choice on these cards" in describe(plan)
    assert planned(tmp_path, PAPER, "--gpus", "8")["zero_2"] is None


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    nested: dict[str, Any] = {}
    packs = write_packs(tmp_path / "packs", make_segments(8))
    for key, value in {**SETTINGS, "train.packs_per_step": 4, "data.train_packs": str(packs)}.items():
        *sections, last = key.split(".")
        section = nested
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(nested))
    return tmp_path / "tiny.yaml"


def test_packs_that_are_there_are_planned_with(tiny: Path, tmp_path: Path) -> None:
    segments = [sum(len(segment.input_ids) for segment in pack) for pack in make_segments(8)]
    plan = planned(tmp_path, "--recipe", str(tiny), "--gpu-memory", "0.5")
    assert plan["steps_per_epoch"] == 2 and plan["pack"]["num_tokens"] == max(segments)
    assert plan["pack"]["num_images"] == 2 and plan["flops_per_step"] > 0 and VISUAL_TOKENS == 2
    assert plan["cards"] == {"0.5 GiB": {"gib": 0.5, "verdict": "too small"}}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["llama2_7b_diht_sciencqa"], f"did you mean '{PAPER}'"),
        (["no/such/recipe.yaml"], "no/such/recipe.yaml: cannot be read"),
        ([], "found no recipe"),
        ([PAPER, "--gpus", "0"], "--gpus: found '0'"),
        ([PAPER, "--gpus", "two"], "--gpus: found 'two'"),
        ([PAPER, "--gpu-memory", "-4"], "--gpu-memory: found '-4'"),
        ([PAPER, "--gpus", "8", "--model.llm.source", "weights/unheard-of"], "model.llm.source: 'weights/unheard-of'"),
        ([PAPER, "--llm-size", "llama-2-7"], "did you mean 'llama-2-7b'"),
        (
            [PAPER, "--instructblip-size", "instructblip-vicuna-7b"],
            "--instructblip-size: has no effect on the architecture mmt",
        ),
        (["qformer_t5", "--llm-size", "llama-7b"], "--llm-size: has no effect on the architecture instructblip"),
        (["qformer_t5", "--instructblip-size", "instructblip-vicuna"], "did you mean 'instructblip-vicuna-7b'"),
        (
            [
                "qformer_t5",
                "--model.bits",
                "4",
                "--model.instructblip.llm.mode",
                "full",
                "--model.instructblip.vision",
                "full",
            ],
            "model.bits",
        ),
        ([PAPER, "--gpu", "8"], "did you mean 'gpus'"),
        ([PAPER, "--model.bits", "4", "--model.tune", "full"], "model.bits"),
    ],
)
def test_mistakes(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--json", str(tmp_path / "plan.json")]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not (tmp_path / "plan.json").exists()


def test_a_deepspeed_file_that_contradicts_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ds = tmp_path / "ds.json"
    ds.write_text(json.dumps({"gradient_clipping": 1.0}))
    assert main([PAPER, "--ds", str(ds)]) == 2
    assert "gradient_clipping" in capsys.readouterr().err


def test_a_recipe_is_a_file_or_a_name() -> None:
    assert find_recipe(PAPER).is_file()
    assert find_recipe("some/where.yaml") == Path("some/where.yaml")


@pytest.mark.usefixtures("one_rehearsal")
def test_an_instructblip_without_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA of rank 8 on every sublayer of the Q-Former is the paper's 2.126M; AdaLoRA starts from rank 12 and keeps two
    averages of each number."""
    sizes = BLIPS["instructblip-flan-t5-xl"].config  # with fewer of the blocks that are frozen: they take half a minute
    monkeypatch.setitem(sizes["text_config"], "num_layers", 2)
    monkeypatch.setitem(sizes, "vision_config", {"num_hidden_layers": 2})
    plan = planned(tmp_path, "qformer_t5", "--model.instructblip.qformer.mode", "adalora", "--data.max_images", "4")
    share = plan["full_qformer_tuning"]
    assert round(share["parameters"] / 1e6, 2) == 187.26 and share["trained"] == plan["parameters"]["all"]["trainable"]
    assert f"low-rank updates {share['updates']:,} ({100 * share['updates'] / share['parameters']:.2f}%)" in describe(
        plan
    )
    trained = {part: count["trainable"] for part, count in plan["parameters"].items()}
    entries = 12 * (12 * 2 + 6 * 4 + 12 * 4)  # of E: one for each direction of each layer, self, cross, ffn
    low_rank = 2_125_824 * 12 // 8 + entries
    assert trained == {
        "peft": low_rank,
        "bridge": 1_602_304,
        "qformer": 0,
        "vision": 0,
        "llm": 0,
        "all": low_rank + 1_602_304,
    }
    held = plan["memory_per_rank"]["held_bytes"]
    assert held["frozen weights, bf16"] == 2 * (plan["parameters"]["all"]["total"] - trained["all"])
    assert held["AdaLoRA's averages"] == 2 * 4 * low_rank
    assert plan["disk"]["checkpoint_bytes"] == 12 * trained["all"] + 8 * low_rank
    assert plan["pack"]["num_images"] == 4 and plan["flops_per_step"] > 0


def test_an_instructblips_packs_are_planned_with(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        dump_config(blip_config("t5", make_tokenizers(tmp_path / "tokenizers"), data__root=str(tmp_path / "data")))
    )
    config = load_settings(["--recipe", str(recipe)], program="", description="", options={}).config
    source, instruction = tokenizer_sources(config)
    encoder = TemplateEncoder(load_tokenizer(source, instruction), config.data.template, QUERIES)
    folder = packed_folder(config, encoder)
    ensure_packs(config, folder, encoder)
    plan = planned(tmp_path, "--recipe", str(recipe))
    assert plan["packs"] == str(folder) and plan["steps_per_epoch"] > 0
    assert plan["pack"]["num_tokens"] <= config.data.pack_length and plan["pack"]["num_images"] > 0
