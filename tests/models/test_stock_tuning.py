"""What a recipe puts into a vision-language model of transformers, and which of its weights it reads and trains."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.test_stock import NO_ADAPTERS, PIECES, plain_of, stock
from tests.support.stock import CONFIGS, row_of, tiny
from vltrain.config.model.mmt import AdapterConfig
from vltrain.config.model.stock import LowRankConfig, NetworkConfig, ProjectorConfig, StockConfig, StockSection
from vltrain.errors import InputError
from vltrain.models.adapters import ADAPTERS, Adapter
from vltrain.models.build import build_model, count_parameters, outline_model
from vltrain.models.quantise import FrozenLinear

BOTH = {"vision": "both", "llm": "both"}


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_every_kind_stand_in_both_networks_start_as_the_identity_and_are_all_reached(kind: str) -> None:
    plain = build_model(tiny("qwen3_vl", adapter=NO_ADAPTERS))
    adapted = build_model(tiny("qwen3_vl", adapter=AdapterConfig(kind=kind, **BOTH)))
    row = row_of("qwen3_vl", plain.parts.core, PIECES)
    torch.testing.assert_close(adapted(row).loss_sum, plain(row).loss_sum, rtol=1e-6, atol=1e-5)
    assert sum(isinstance(module, Adapter) for module in adapted.modules()) == 2 * (2 + 3)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert ".adapter." in name
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    adapted(row).loss_sum.backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name


def test_a_tower_that_is_not_read_to_its_end_has_nothing_where_nothing_reaches() -> None:
    """LLaVA reads the state before its tower's last block."""
    model = build_model(tiny("llava", tune="full", adapter=AdapterConfig(dim=4, **BOTH)))
    names = trained(model)
    assert any(".encoder.layers.0." in name for name in names)
    assert not any(".encoder.layers.1." in name or ".post_layernorm." in name for name in names)


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "pissa"])
def test_low_rank_updates_leave_the_function_and_everything_else_as_it_was(kind: Any) -> None:
    peft = LowRankConfig(kind=kind, rank=4, targets=("*_proj", "mlp.*"))
    plain = build_model(tiny("smolvlm", adapter=NO_ADAPTERS))
    updated = build_model(
        tiny("smolvlm", adapter=NO_ADAPTERS, vision=NetworkConfig(peft=peft), llm=NetworkConfig(peft=peft))
    )
    row = row_of("smolvlm", plain.parts.core, PIECES)
    torch.testing.assert_close(updated(row).loss_sum, plain(row).loss_sum, rtol=1e-5, atol=1e-4)
    updated(row).loss_sum.backward()
    assert all(".lora_" in name for name in trained(updated))
    assert sum(name.endswith(".lora_A.default.weight") for name in trained(updated)) == 2 * 6 + 2 * 7
    assert any("magnitude" in name for name in trained(updated)) == (kind == "dora")
    assert all(parameter.grad is not None for parameter in updated.parameters() if parameter.requires_grad)


def test_parts_are_trained_as_the_recipe_says() -> None:
    counts = count_parameters(build_model(tiny("qwen3_vl", tune="projector")))
    assert counts["adapter"] == (0, 0) and [part for part, (_, own) in counts.items() if own] == ["projector"]
    counts = count_parameters(
        build_model(tiny("qwen3_vl", projector=ProjectorConfig(train=True), vision=NetworkConfig(train=True)))
    )
    assert [part for part, (total, own) in counts.items() if own] == ["adapter", "projector", "vision"]
    assert all(total == own for total, own in counts.values() if own)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"llm": NetworkConfig(peft=LowRankConfig(kind="lora", targets=("c_attn",)))}, "called 'c_attn'; they have q_"),
        ({"config": {"model_type": "llama"}}, "no vision-language model"),
        ({"config": {"model_type": "qwen9_vl"}}, "did you mean|newer releases know more"),
        ({"config": {"model_type": "phi3_v", "auto_map": {}}}, "runs code of its own folder"),
        ({"config": {**CONFIGS["llava"], "image_token_id": 300}}, "image_token_id: found 300, expected an id below"),
        ({"config": {"model_type": "mllama"}}, "cross-attention"),
        ({"config": {"model_type": "udop"}}, "encoder-decoder"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(section: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        build_model(StockConfig(stock=StockSection(**{"config": CONFIGS["llava"], "processor": "none", **section})))
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_frozen_blocks_are_packed_into_few_bits(bits: int) -> None:
    model = build_model(tiny("qwen3_vl", bits=bits, adapter=AdapterConfig(dim=4)))
    packed = [name for name, module in model.named_modules() if isinstance(module, FrozenLinear)]
    assert any(".visual.blocks." in name for name in packed) and any(".layers." in name for name in packed)
    assert not any("merger" in name or "lm_head" in name for name in packed)
    row = row_of("qwen3_vl", model.parts.core, PIECES)
    model(row).loss_sum.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder as transformers writes it, tied weights once."""
    plain_of(stock("gemma3", adapter=NO_ADAPTERS)).save_pretrained(tmp_path)
    return tmp_path


def from_folder(folder: Path) -> StockConfig:
    return StockConfig(stock=StockSection(source=str(folder)), adapter=NO_ADAPTERS, seed=9)


@pytest.mark.parametrize("name", ["llava", "smolvlm", "qwen3_vl", "qwen2_5_vl", "internvl", "paligemma", "qwen3_5"])
def test_a_folder_of_transformers_is_read_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = stock(name, adapter=NO_ADAPTERS)
    plain_of(model).save_pretrained(tmp_path)
    outline_model(from_folder(tmp_path))
    found, expected = build_model(from_folder(tmp_path)).state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape", "untied", "pickled"])
def test_weights_that_do_not_fit_are_refused_before_they_are_read(saved: Path, fault: str) -> None:
    file = saved / "model.safetensors"
    weights = load_file(file)
    name = next(key for key in weights if "layers.1.mlp.up_proj" in key and "vision" not in key)
    table = next(key for key in weights if key.endswith("embed_tokens.weight"))
    said = "layers.1.mlp.up_proj"
    if fault == "missing":
        del weights[name]
    elif fault == "unknown":
        said = "a.b.c"
        weights[said] = torch.zeros(3)
    elif fault == "shape":
        weights[name] = weights[name][:-1].clone()
    elif fault == "untied":
        said = "lm_head.weight differs"
        weights["lm_head.weight"] = weights[table] + 1
    else:
        said = "expected safetensors"
        file.unlink()
        torch.save(weights, saved / "pytorch_model.bin")
    if fault != "pickled":
        save_file(weights, file, {"format": "pt"})
    with pytest.raises(InputError, match=said):
        outline_model(from_folder(saved))
