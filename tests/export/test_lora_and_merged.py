"""`vltrain export --format lora|merged`: folders that stock peft and transformers load, who else does, and what is
refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPVisionModel, GenerationConfig, LlamaForCausalLM

from tests.models.tiny_models import randomise_adapters
from tests.support.finished_run import Places, finished_run
from vltrain.config.model.mmt import PeftConfig
from vltrain.config.recipe import build_config, dump_config
from vltrain.data.images import decode_image
from vltrain.errors import InputError
from vltrain.export.engines import ENGINES, require_engine, who_loads
from vltrain.export.table import find_format
from vltrain.models.build import build_model
from vltrain.models.mmt.merge import merge_adapters
from vltrain.programs.export import export
from vltrain.train.checkpoints.checkpoint import save_checkpoint

PEFT = {
    "model__llm__peft__kind": "lora",
    "model__llm__peft__rank": 3,
    "model__llm__peft__targets": ("q_proj", "o_proj"),
}
TOWER = {
    "model__vision__peft__kind": "pissa",
    "model__vision__peft__rank": 3,
    "model__vision__peft__targets": ("q_proj", "fc2"),
}


def tuned_run(folder: Path, **changes: Any) -> tuple[Places, Any]:
    """A run whose adapters do something. Returns it and its model."""
    places = finished_run(folder)
    config = places.config(**changes)
    model = build_model(config.model).eval()
    randomise_adapters(model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(4))
    (places.run / "config.yaml").write_text(dump_config(config))
    (places.run / "run.json").unlink()
    state = ((name, one.detach(), {}) for name, one in model.named_parameters() if one.requires_grad)
    identity = json.loads(json.dumps({"model": config.model.identity()}))
    save_checkpoint(state, places.run / "checkpoints", step=9, belongs_to=identity, keep=9, is_writer=True)
    return places, model


@pytest.mark.parametrize("form", ["lora", "merged"])
def test_a_clean_process_with_stock_libraries_says_what_the_run_says(form: str, tmp_path: Path, capsys: Any) -> None:
    places, _ = tuned_run(tmp_path, **PEFT, **TOWER)
    export(places.run, tmp_path / "out", form, proof_samples=2)
    proof = json.loads((tmp_path / "out" / "proof.json").read_text())
    assert (
        proof["proven"]
        and proof["max_relative_error"] <= 1e-5
        and proof["answers_equal"] == 2
        and "vltrain" not in proof["versions"]
    )
    told, origin = capsys.readouterr().out, json.loads((tmp_path / "out" / "vltrain_origin.json").read_text())
    assert all(note in told for note in origin["notes"])
    if form == "lora":
        assert (
            "vLLM, SGLang, llama.cpp do not: it has a constant" in told
            and "model.adapter.bias false" in told
            and origin["rank"] == {"llm": 7, "vision": 4 + 2 * 3}
        )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["lora", "merged"])
@pytest.mark.parametrize(
    "changes",
    [
        {"model__adapter__llm": "both", "model__adapter__vision": "both", "model__adapter__down_groups": 2},
        {"model__adapter__llm": "ffn", "model__adapter__vision": "none", "model__adapter__bias": False, **PEFT},
        {"model__adapter__kind": "repadapter", "model__adapter__scale": 0.5},
        {"model__adapter__llm": "none", "model__neck__kind": "linear", "model__neck__dim": 128, **PEFT},
        {
            "model__adapter__llm": "none",
            "model__adapter__vision": "none",
            **PEFT,
            **TOWER,
            "model__llm__peft__kind": "pissa",
        },
        {"model__bits": 4, "model__adapter__llm": "both", **PEFT, **TOWER, "model__vision__peft__kind": "lora"},
        {"model__bits": 8, "model__adapter__bias": False},
        {"model__bits": 16, "train__precision": "bf16"},
    ],
    ids=["both", "ffn", "repadapter", "linear neck", "PiSSA", "4 bits", "8 bits", "16 bits"],
)
def test_every_kind_of_tuning_is_proven(changes: dict[str, Any], form: str, tmp_path: Path) -> None:
    places, _ = tuned_run(tmp_path, **changes)
    export(places.run, tmp_path / "out", form, proof_samples=1)
    assert json.loads((tmp_path / "out" / "proof.json").read_text())["max_relative_error"] <= 1e-5


def test_a_base_that_is_no_folder_of_transformers_is_told(tmp_path: Path, capsys: Any) -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    places, _ = tuned_run(tmp_path, model__vision__source=None, model__vision__config=sizes)
    export(places.run, tmp_path / "out", "lora", proof_samples=None)
    assert (
        "for random weights: vltrain export --checkpoint none --format merged writes it as a folder"
        in capsys.readouterr().out
    )
    assert (
        json.loads((tmp_path / "out" / "vision" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    )
    assert json.loads((tmp_path / "out" / "llm" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        places.llama
    )


def test_a_lora_folder_is_what_peft_and_engines_read(tmp_path: Path, capsys: Any) -> None:
    places, model = tuned_run(tmp_path, model__adapter__bias=False, model__adapter__vision="none", **PEFT)
    export(places.run, tmp_path / "out", "lora", proof_samples=None, given={"engine": "vllm", "dtype": "bf16"})
    assert (
        "vLLM loads it: vllm serve BASE --enable-prompt-embeds --enable-lora --max-lora-rank 8 "
        in capsys.readouterr().out
    )
    assert not (tmp_path / "out" / "vision").exists(), "no adapters there"
    said = json.loads((tmp_path / "out" / "llm" / "adapter_config.json").read_text())
    assert (said["peft_type"], said["task_type"], said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (
        "LORA",
        "CAUSAL_LM",
        7,
        7,
        str(places.llama),
    )
    assert (
        said["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
        and said["bias"] == "none"
        and not said["lora_bias"]
    )
    tensors = load_file(tmp_path / "out" / "llm" / "adapter_model.safetensors")
    # What vLLM's `parse_fine_tuned_lora_name` takes, and its rank.
    assert all(
        name.startswith("base_model.model.model.layers.") and name.endswith((".lora_A.weight", ".lora_B.weight"))
        for name in tensors
    )
    assert all(7 in tensor.shape and tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    assert {path.name for path in (tmp_path / "out" / "llm").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "</s>"
        and AutoImageProcessor.from_pretrained(tmp_path / "out").size["height"] == 64
    )
    neck = load_file(tmp_path / "out" / "neck.safetensors")
    assert torch.equal(neck["modality_embedding.weight"], model.modality_embedding.weight) and torch.equal(
        neck["down.weight"], model.neck.down.weight
    )
    described = json.loads((tmp_path / "out" / "multimodal.json").read_text())
    assert (described["visual_tokens"], described["tap_every"], described["llm"]) == (4, 1, str(places.llama))


@pytest.mark.parametrize("bias", [True, False])
def test_merged_networks_are_stock_ones(bias: bool, tmp_path: Path) -> None:
    places, model = tuned_run(
        tmp_path, model__adapter__bias=bias, model__adapter__llm="ffn", eval__temperature=0.5, eval__top_p=0.9
    )
    export(places.run, tmp_path / "out", "merged", proof_samples=None, given={"dtype": "bf16"})
    merge_adapters(model)
    networks = {"llm": (LlamaForCausalLM, model.llm), "vision": (CLIPVisionModel, model.vision.clip)}
    largest, off, whole = 0.0, 0.0, 0.0
    for name, (kind, ours) in networks.items():
        found, report = kind.from_pretrained(tmp_path / "out" / name, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and found.dtype == torch.bfloat16
        expected = dict(ours.named_parameters())
        for key, value in found.named_parameters():
            assert torch.equal(value, expected[key].bfloat16()), key
            error = (value.double() - expected[key].double()).abs()
            largest, off, whole = (
                max(largest, error.max().item()),
                off + error.square().sum().item(),
                whole + expected[key].double().square().sum().item(),
            )
    llm = LlamaForCausalLM.from_pretrained(tmp_path / "out" / "llm")
    assert llm.config.mlp_bias == bias and not llm.config.attention_bias
    assert llm.lm_head.weight is llm.model.embed_tokens.weight, "the head is tied as it was"
    rounding = json.loads((tmp_path / "out" / "vltrain_origin.json").read_text())["rounding"]
    assert rounding == pytest.approx({"largest": largest, "relative": (off / whole) ** 0.5}, rel=1e-6) and largest > 0
    chosen = GenerationConfig.from_pretrained(tmp_path / "out" / "llm")
    assert (chosen.do_sample, chosen.temperature, chosen.top_p, chosen.top_k, chosen.eos_token_id) == (
        True,
        0.5,
        0.9,
        0,
        [2],
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "llm").encode("is it red?", add_special_tokens=False)


def test_pixels_of_the_image_processor_are_ours(tmp_path: Path) -> None:
    places, model = tuned_run(tmp_path)
    export(places.run, tmp_path / "out", "merged", proof_samples=None)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    image.save(tmp_path / "one.png")
    ours = (
        torch.from_numpy(
            decode_image((tmp_path / "one.png").read_bytes(), model.image_size, 10**8, "one.png", model.framing)
        ).float()
        / 255
    )
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "out" / "vision")(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(theirs, ((ours - model.vision.mean) / model.vision.std)[0], rtol=0, atol=1e-5)


def test_a_weight_that_fp16_cannot_hold_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    places, model = tuned_run(
        tmp_path, model__llm__train=True, model__adapter__llm="none", model__adapter__vision="none"
    )
    state = (
        (name, one.detach() * (1e7 if name.endswith("mlp.up_proj.weight") else 1), {})
        for name, one in model.named_parameters()
        if one.requires_grad
    )
    identity = json.loads(
        json.dumps(
            {
                "model": places.config(
                    model__llm__train=True, model__adapter__llm="none", model__adapter__vision="none"
                ).model.identity()
            }
        )
    )
    save_checkpoint(state, places.run / "checkpoints", step=11, belongs_to=identity, keep=9, is_writer=True)
    with pytest.raises(
        InputError,
        match=r"model.layers.0.mlp.up_proj.weight: has a weight of .*e\+0., which fp16 cannot hold; take --dtype bf16 "
        r"or fp32",
    ):
        export(places.run, tmp_path / "out", "merged", proof_samples=None, given={"dtype": "fp16"})
    assert not (tmp_path / "out").exists()


def model_of(**changes: Any) -> Any:
    sizes = {
        "model.vision.source": "asset://tiny_vit",
        "model.vision.tap_every": 1,
        "model.llm.source": "asset://tiny_llama",
    }
    return build_config({**sizes, **{name.replace("__", "."): value for name, value in changes.items()}}).model


WITH_BIAS: dict[str, Any] = {}
WITHOUT = {"model__adapter__bias": False}
LORA_ALONE = {"model__adapter__llm": "none", "model__llm__peft__kind": "lora"}


@pytest.mark.parametrize(
    "engine, changes, named",
    [
        ("vllm", WITH_BIAS, r"--engine vllm: vLLM takes no LoRA with a constant .* model.adapter.bias false"),
        ("llamacpp", WITH_BIAS, r"llama.cpp takes no LoRA with a constant"),
        ("sglang", WITH_BIAS, r"SGLang takes no LoRA with a constant"),
        (
            "vllm",
            {**WITHOUT, "model__adapter__dim": 1024, "model__adapter__vision": "none"},
            r"the rank 1024, and vLLM takes 512 at most",
        ),
        ("vllm", {**LORA_ALONE, "model__llm__peft__kind": "dora"}, r"found 'dora', of which vLLM loads nothing"),
        ("vllm", {"model__adapter__llm": "none"}, r"the LLM is not tuned here"),
        ("vlm", WITHOUT, r"--engine: found 'vlm'; did you mean 'vllm'"),
    ],
)
def test_an_engine_that_could_not_load_it_is_refused(engine: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        require_engine(engine, model_of(**changes))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("changes", [WITHOUT, LORA_ALONE])
def test_engines_take_what_has_no_constant(engine: str, changes: dict[str, Any]) -> None:
    """Adapters with biases in the ViT alone are no matter of theirs."""
    require_engine(engine, model_of(**changes))
    assert len(who_loads(model_of(**changes))) == len(ENGINES)


def test_the_rank_that_vllm_wants_to_be_told() -> None:
    ranks = {
        dim: next(line for line in who_loads(model_of(**WITHOUT, model__adapter__dim=dim)) if "vLLM" in line)
        for dim in (2, 8, 16, 24, 512)
    }
    assert [line.split("--max-lora-rank ")[1].split()[0] for line in ranks.values()] == ["8", "8", "16", "32", "512"]
    both = model_of(**WITHOUT, model__llm__peft__kind="lora", model__llm__peft__rank=8)  # q and v have both: 16 + 8
    assert any("--max-lora-rank 32 " in line for line in who_loads(both))
    assert PeftConfig().targets == ("q_proj", "v_proj")


def test_what_other_architectures_call_it_is_told() -> None:
    with pytest.raises(
        InputError,
        match="instructblip has no format 'merged': what it holds, whole holds here, expected one of peft, whole, "
        "adapters",
    ):
        find_format("instructblip", "merged", "--format")
    with pytest.raises(InputError, match="has no format 'lora': what it holds, peft holds here"):
        find_format("instructblip", "lora", "--format")
