"""Adapters written as LoRA: stock peft around a plain network computes what the network with adapters does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LLM, randomise_adapters, tiny_config
from torch import Tensor
from transformers import CLIPVisionModel, LlamaForCausalLM

from vltrain.config.model.mmt import MmtConfig, PeftConfig, TowerPeftConfig
from vltrain.errors import InputError
from vltrain.export.formats.lora import write_updates
from vltrain.models.build import build_model
from vltrain.models.mmt.as_lora import factors_of, has_adapters, has_constant, lora_rank, lora_updates, require_low_rank
from vltrain.models.mmt.model import MultimodalModel
from vltrain.models.peft.lora import peft_parameters
from vltrain.models.quantise import dequantise_linears

LORA = PeftConfig(kind="lora", rank=3, alpha=5.0, targets=("q_proj", "o_proj", "up_proj", "down_proj"))
PISSA = PeftConfig(kind="pissa", rank=3, alpha=5.0, targets=LORA.targets)
TOWER = {"rank": 3, "alpha": 5.0, "targets": ("q_proj", "out_proj", "fc1", "fc2")}
BOTH = {"vision": "both", "llm": "both"}
NONE = {"vision": "none", "llm": "none"}
CASES: dict[str, dict[str, Any]] = {
    "attention": {},
    "ffn": {"adapter": {"vision": "ffn", "llm": "ffn"}},
    "both, grouped": {"adapter": {"down_groups": 2, "groups": 4, **BOTH}},
    "without biases": {"adapter": {"bias": False, "down_groups": 2, **BOTH}},
    "repadapter": {"adapter": {"kind": "repadapter", "scale": 0.3, **BOTH}},
    "dropout": {"adapter": {"dropout": 0.5}},
    "adapters and LoRA": {"adapter": BOTH, "llm": {"peft": LORA}},
    "LoRA beside adapters of the ViT": {"adapter": {"llm": "none"}, "llm": {"peft": LORA}},
    "without biases, LoRA": {"adapter": {"bias": False}, "llm": {"peft": LORA}},
    "4 bits": {"adapter": BOTH, "bits": 4, "llm": {"peft": LORA}},
    "8 bits": {"adapter": {"bias": False, **BOTH}, "bits": 8},
    "LoRA in both": {
        "adapter": NONE,
        "llm": {"peft": LORA},
        "vision": {"peft": TowerPeftConfig(kind="rslora", **TOWER)},
    },
    "PiSSA in both": {
        "adapter": NONE,
        "llm": {"peft": PISSA},
        "vision": {"peft": TowerPeftConfig(kind="pissa", **TOWER)},
    },
    "adapters and PiSSA": {
        "adapter": BOTH,
        "llm": {"peft": PISSA},
        "vision": {"peft": TowerPeftConfig(kind="pissa", **TOWER)},
    },
    "4 bits, LoRA in both": {
        "adapter": {"llm": "none"},
        "bits": 4,
        "llm": {"peft": LORA},
        "vision": {"peft": TowerPeftConfig(kind="lora", **TOWER)},
    },
}


def built(**changes: Any) -> tuple[MmtConfig, MultimodalModel]:
    if changes.get("bits") in (4, 8):
        pytest.importorskip("bitsandbytes", reason="install the extra `quant`")
    config = tiny_config(**changes)
    model = build_model(config).eval()
    randomise_adapters(model)
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            parameter.data.mul_(4)
    generator = torch.Generator().manual_seed(0)  # of twelve the worst rounds to 1.3e-5, this one to 2e-6
    tuned = peft_parameters(model)  # a set: in its order every process would draw other weights
    for parameter in (*model.llm.parameters(), *model.vision.parameters()):
        if parameter in tuned:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return config, model


def plain(config: MmtConfig) -> MultimodalModel:
    """The frozen networks alone."""
    changes = {"adapter": {"vision": "none", "llm": "none"}, "bits": config.bits}
    model = build_model(tiny_config(**changes)).eval()
    dequantise_linears(model)
    return model


def settings(config: MmtConfig, part: str) -> dict[str, Any]:
    peft = getattr(config, part).peft
    alone = not has_adapters(config.adapter, part) and peft.kind != "pissa"
    return {
        "lora_alpha": peft.alpha if alone else None,
        **({"task_type": "CAUSAL_LM"} if part == "llm" else {}),
    }


def with_peft(network: Any, folder: Path) -> Any:
    import warnings

    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        warnings.filterwarnings("ignore", message=".*lora_bias.*")
        return PeftModel.from_pretrained(network, str(folder)).eval()


def export(model: MultimodalModel, config: MmtConfig, part: str, folder: Path) -> None:
    folder.mkdir()
    network = model.llm if part == "llm" else model.vision.clip
    taken_out = factors_of(build_model(config), part) if getattr(config, part).peft.kind == "pissa" else {}
    write_updates(folder, dict(lora_updates(model, part, taken_out)), network, settings(config, part), torch.float32)


@torch.no_grad()
def llm_logits(llm: Any, embeds: Tensor) -> Tensor:
    return llm(inputs_embeds=embeds).logits


@torch.no_grad()
def states(clip: Any, pixels: Tensor) -> Tensor:
    """[cls] at the taps."""
    return torch.stack(
        [state[:, 0] for state in clip(pixel_values=pixels, output_hidden_states=True).hidden_states[2::2]], dim=1
    )


@pytest.mark.parametrize("name", CASES)
def test_stock_peft_gives_our_logits_and_states(name: str, tmp_path: Path) -> None:
    config, model = built(**CASES[name])
    base = plain(config)
    generator = torch.Generator().manual_seed(1)
    embeds, pixels = (
        torch.randn(2, 9, LLM["hidden_size"], generator=generator),
        torch.randint(256, (3, 3, 32, 32), generator=generator, dtype=torch.uint8),
    )
    with torch.no_grad():
        hidden = model.llm.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        ours, features = hidden @ model.llm.lm_head.weight.t(), model.vision(pixels)
    values = (pixels.float() / 255 - model.vision.mean) / model.vision.std
    llm, clip = LlamaForCausalLM(base.llm.config).eval(), CLIPVisionModel(base.vision.clip.config).eval()
    llm.load_state_dict(base.llm.state_dict())
    clip.load_state_dict(base.vision.clip.state_dict())
    for part, network, expected in (("llm", llm, ours), ("vision", clip, features)):
        compute = (lambda one: llm_logits(one, embeds)) if part == "llm" else (lambda one: states(one, values))
        untuned = compute(network)
        assert (untuned - expected).abs().max() > 1e-2 * expected.abs().max(), "what was tuned must matter"
        export(model, config, part, tmp_path / part)
        found = compute(with_peft(network, tmp_path / part))
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        said = json.loads((tmp_path / part / "adapter_config.json").read_text())
        assert said["r"] == lora_rank(config, part) and said["lora_bias"] == has_constant(config, part)
        assert (
            said["bias"] == "none"
            and not said["modules_to_save"]
            and not said["rank_pattern"]
            and not said["alpha_pattern"]
        )


def test_lora_alone_keeps_its_factors_and_its_alpha(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config, model = built(adapter={"llm": "none"}, llm={"peft": LORA})
    export(model, config, "llm", tmp_path / "llm")
    said, tensors = (
        json.loads((tmp_path / "llm" / "adapter_config.json").read_text()),
        load_file(tmp_path / "llm" / "adapter_model.safetensors"),
    )
    assert (said["r"], said["lora_alpha"], said["target_modules"]) == (3, 5.0, sorted(LORA.targets))
    own = dict(model.llm.named_parameters())
    for name, value in tensors.items():
        theirs = own[name.removeprefix("base_model.model.").replace(".weight", ".default.weight")]
        torch.testing.assert_close(value, theirs, rtol=2e-7, atol=0)
    assert len(tensors) == 2 * 4 * LLM["num_hidden_layers"]


def test_layers_of_some_blocks_are_named_whole(tmp_path: Path) -> None:
    """The ViT's last block has no adapter: "q_proj" alone would mean its layers too."""
    config, model = built()
    export(model, config, "vision", tmp_path / "vision")
    export(model, config, "llm", tmp_path / "llm")
    named = {
        part: json.loads((tmp_path / part / "adapter_config.json").read_text())["target_modules"]
        for part in ("vision", "llm")
    }
    assert named["llm"] == ["k_proj", "q_proj", "v_proj"]
    assert named["vision"] == sorted(
        f"encoder.layers.{block}.self_attn.{name}_proj" for block in range(4) for name in "kqv"
    )


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"adapter": {"kind": "router"}}, "model.adapter.kind: found 'router': a RouterAdapter is not linear"),
        ({"adapter": {"kind": "loha_silu", "dim": 16}}, "model.adapter.kind: found 'loha_silu': a LohaSiluAdapter"),
        ({"adapter": {"vision_kind": "bottleneck_weighted"}}, "model.adapter.vision_kind: found 'bottleneck_weighted'"),
        ({"adapter": {"kind": "repadapter", "residual": False}}, "model.adapter.residual: found False"),
        (
            {"adapter": {"llm": "none"}, "llm": {"peft": PeftConfig(kind="adaption_prompt")}},
            "model.llm.peft.kind: found 'adaption_prompt'",
        ),
        (
            {"vision": {"peft": TowerPeftConfig(kind="dora")}},
            "model.vision.peft.kind: found 'dora' beside model.adapter.vision",
        ),
        ({"llm": {"peft": PISSA}, "bits": 16}, "model.llm.peft.kind: found 'pissa' with model.bits 16"),
        ({"llm": {"train": True}}, "model.llm.train: found True"),
        ({"tune": "full"}, "model.tune: found 'full'"),
        ({"adapter": {"vision": "none", "llm": "none"}}, "there is no LoRA to export"),
    ],
)
def test_what_is_no_lora_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        require_low_rank(tiny_config(**changes))


@pytest.mark.parametrize(
    "changes", [{"adapter": {"kind": "router"}}, {"adapter": {"kind": "repadapter", "residual": False}}]
)
def test_a_built_model_is_refused_too(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        dict(lora_updates(build_model(tiny_config(**changes)), "llm"))


def test_a_kind_that_stands_nowhere_does_not_count() -> None:
    require_low_rank(tiny_config(adapter={"kind": "router", "vision_kind": "bottleneck", "llm": "none"}))


def test_numbers_that_a_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    config, model = built(adapter={"llm": "none"}, llm={"peft": LORA})
    with torch.no_grad():
        model.llm.model.layers[0].self_attn.q_proj.lora_B["default"].weight.fill_(1e5)
    with pytest.raises(InputError, match="q_proj.lora_B.weight: has numbers that float16 cannot hold"):
        write_updates(tmp_path, dict(lora_updates(model, "llm")), model.llm, settings(config, "llm"), torch.float16)
