"""The check raises no alarm on any recipe that comes with vltrain, however it is tuned, read and cut into stages: small
random networks of its families, its own tokenizers' kinds and processors, in fp32 and in bf16. A file that is added to
launch/recipes is checked without a line here. Nor on stock models of further families, compiled blocks, or the fused
kernel."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.preflight.small_recipes import all_recipes, recipe_named, small_recipes
from tests.support.processes import run_ranks
from tests.support.processors import KINDS, config_of
from tests.support.stock import CONFIGS
from tests.support.stock_world import stock_recipe
from vltrain.shipped import RECIPES

# With the processor of another one.
FURTHER = {"paligemma2": "paligemma", "llava_siglip": "llava", "qwen3_5": "qwen3_vl"}
LORA = {"peft": {"kind": "lora", "rank": 4, "targets": ["*_proj"]}}


def check_all(folder, files):
    results = {name: folder / f"result-{number}" for number, name in enumerate(files)}
    told = [
        {"recipe": str(file), "words": ["--ds", "zero2"], "result": str(results[name]), "both": True}
        for name, file in files.items()
    ]
    (folder / "told.json").write_text(json.dumps(told))
    run_ranks("tests.preflight.command_worker", [str(folder / "told.json")], 1, folder / "log", 3000)
    return {name: json.loads(Path(f"{result}.0").read_text()) for name, result in results.items()}


OF_DATA = ("answers of", "images of", "'", "repeated samples", "longest answers", "packs: ", "unknown tokens")


def alarms(found, *, about_data=True):
    """What is not ok, by recipe. about_data: what the report on the data warns of counts."""
    wrong = []
    for name, one in found.items():
        lines = [line for line in one["lines"] if ("FAILED  " in line or "WARNING " in line)]
        lines = [line for line in lines if about_data or not line.partition(" ")[2].strip().startswith(OF_DATA)]
        lines += one["lines"][-1:] if one["code"] == 2 else []
        wrong += [f"{name}: {line}" for line in lines or ([one["code"]] if about_data and one["code"] else [])]
    return "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_recipe_raises_an_alarm(tmp_path, precision):
    files = small_recipes(tmp_path / "small", precision, all_recipes())
    assert {name.partition("#")[0] for name in files} <= {path.stem for path in RECIPES.glob("*.yaml")}
    assert len(files) > 60
    found = check_all(tmp_path, files)
    assert alarms(found) == ""
    assert all(len(one["lines"]) >= 20 for one in found.values())


def stock_files(folder: Path, precision: str) -> dict[str, Path]:
    """A recipe of each family, with adapters everywhere and LoRA in the LLM; and one tuned whole."""
    files = {}
    for name in (*KINDS, *FURTHER):
        (folder / name).mkdir(parents=True)
        kind = FURTHER.get(name, name)
        config = config_of(kind)
        if name == "internvl":  # whose blocks begin with a tenth of what they compute: a tower a thousand times off
            config = {**config, "vision_config": {**config["vision_config"], "layer_scale_init_value": 1.0}}
        if name in FURTHER:
            own = {key: value for key, value in CONFIGS[name].items() if not key.endswith("_token_id")}
            vocabulary = config["text_config"]["vocab_size"]
            config = {**config, **own, "text_config": {**own["text_config"], "vocab_size": vocabulary}}
        adapter: Any = {"dim": 8, "vision": "both", "llm": "none", "bias": False}
        train = {"precision": precision, "packs_per_step": 4}
        model = {"config": config, "llm": LORA}
        files[name] = stock_recipe(kind, folder / name, model, adapter=adapter, train=train)
    whole = yaml.safe_load(files["smolvlm"].read_text())
    whole["model"] |= {"adapter": {"vision": "none", "llm": "none"}}
    whole["model"]["stock"] = {**whole["model"]["stock"], "tune": "full"}
    del whole["model"]["stock"]["llm"]
    files["whole"] = folder / "whole.yaml"
    files["whole"].write_text(yaml.safe_dump(whole))
    return files


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_stock_family_raises_an_alarm(tmp_path, precision):
    found = check_all(tmp_path, stock_files(tmp_path / "stock", precision))
    # Of two colours and two dozen samples the data report has something to say.
    assert alarms(found, about_data=False) == ""
    assert len(found) == len(KINDS) + len(FURTHER) + 1


@pytest.mark.slow
def test_compiled_blocks_the_fused_kernel_and_stages_raise_none(tmp_path):
    names = ("quickstart", "smolvlm_256m", "smolvlm_256m_lora")
    small = small_recipes(tmp_path / "small", "fp32", map(recipe_named, names))
    changes: dict[str, dict[str, Any]] = {
        "compiled": {"train": {"compile": True}},
        "fused": {"model": {"adapter": {"impl": "triton"}}},
        "fused, bf16": {"model": {"adapter": {"impl": "triton"}}, "train": {"precision": "bf16"}},
        "compiled, bf16": {"train": {"compile": True, "precision": "bf16"}},
        "recomputed": {"train": {"activation_checkpointing": True}},
        "stages": {"stages": {"neck": {"model": {"tune": "neck"}}, "adapters": {}}},
    }
    files = {}
    for (name, base), (title, change) in ((one, other) for one in small.items() for other in changes.items()):
        if title.startswith("fused") and name.endswith("lora") or title == "stages" and name != "quickstart":
            continue
        file = tmp_path / f"{name}-{title.replace(', ', '-')}.yaml"
        file.write_text(yaml.safe_dump({"base": str(base), "output": str(tmp_path / "nowhere"), **change}))
        files[f"{name}, {title}"] = file
    found = check_all(tmp_path, files)
    assert alarms(found) == ""
    assert any(line.startswith("adapters: ok") for line in found["quickstart, stages"]["lines"])
