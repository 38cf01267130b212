"""Quantised networks compute what their dequantised weights do, forward and backward, and count as what they stand
for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import LLM, mixed_batch, randomise_adapters, tiny_config
from torch import nn

from vltrain.config.model.mmt import PeftConfig
from vltrain.config.schema import Config
from vltrain.distributed.hardware import choose_dtype
from vltrain.errors import InputError
from vltrain.models.build import build_model, count_parameters, outline_model
from vltrain.models.mmt.merge import merge_adapters
from vltrain.models.mmt.model import MultimodalModel
from vltrain.models.quantise import Int8Linear, bitsandbytes, dequantise_linears, quantise_linears

pytest.importorskip("bitsandbytes", reason="install the extra `quant`")
LORA, PROMPTS = PeftConfig(kind="lora", targets=("q_proj", "down_proj")), PeftConfig(kind="adaption_prompt")


def build(
    bits: int | None, checkpointing: bool = False, dtype: torch.dtype = torch.float32, **choice: Any
) -> MultimodalModel:
    model = build_model(tiny_config(bits=bits, **choice), dtype=dtype, activation_checkpointing=checkpointing)
    randomise_adapters(model)
    return model


def gradients(model: MultimodalModel) -> dict[str, torch.Tensor]:
    model(mixed_batch()).loss_sum.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_nf4_weights_are_the_published_codes_times_scales() -> None:
    """Blocks of 64 in the order of memory, across rows: code * largest magnitude, but for the 8-bit scale of the
    scale."""
    codes = torch.tensor(
        [
            -1.0,
            -0.6961928,
            -0.5250731,
            -0.3949175,
            -0.2844414,
            -0.1847734,
            -0.0910500,
            0.0,
            0.0795803,
            0.1609302,
            0.2461123,
            0.3379152,
            0.4407098,
            0.5626170,
            0.7229568,
            1.0,
        ]
    )
    block = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64))
    weights = [linear.weight.detach().clone() for linear in block]
    quantise_linears(block, 4)
    dequantise_linears(block)
    for linear, weight in zip(block, weights):
        blocks = weight.view(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True)
        nearest = codes[(blocks[..., None] / scale[..., None] - codes).abs().argmin(-1)] * scale
        assert (linear.weight.view(-1, 64) - nearest).abs().max() < 0.02 * scale.max()
        assert not torch.equal(linear.weight, weight)


def test_int8_weights_are_within_half_a_step_of_each_row() -> None:
    linear = nn.Linear(64, 48)
    expected = linear.weight.detach()
    step = expected.abs().amax(1, keepdim=True) / 127
    assert ((Int8Linear(linear).dequantised(torch.float32) - expected).abs() <= 0.51 * step + 1e-4).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_is_its_dequantised_product_forward_and_backward(bits: int, training: bool, autocast: bool) -> None:
    """Also after an evaluation, in which some CPUs' kernels would pack the weights anew."""
    dtype = torch.bfloat16 if autocast else torch.float32
    block = nn.Sequential(nn.Linear(96, 64))
    quantise_linears(block, bits)
    x = torch.randn(2, 7, 96, requires_grad=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        block.eval()(x)
    block.train(training)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = block(x)
    found.float().square().sum().backward()
    gradient, x.grad = x.grad, None
    dequantise_linears(block)
    expected = F.linear(x.to(dtype), block[0].weight.to(dtype), block[0].bias.to(dtype))
    expected.float().square().sum().backward()
    tolerance = 2e-2 if autocast else 1e-5
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, x.grad, rtol=tolerance, atol=tolerance * x.grad.abs().max().item())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("peft", [PeftConfig(), LORA, PROMPTS], ids=["adapters", "lora", "prompts"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_the_dequantised_model(
    bits: int, peft: PeftConfig, checkpointing: bool
) -> None:
    choice = {"llm": {"peft": peft}, "adapter": {"vision": "both", "llm": "both"}}
    model, plain = build(bits, checkpointing, **choice), build(bits, **choice)
    dequantise_linears(plain)
    assert all(parameter.is_floating_point() for parameter in plain.parameters())
    torch.testing.assert_close(
        model(mixed_batch()).segment_losses, plain(mixed_batch()).segment_losses, rtol=1e-5, atol=1e-5
    )
    found, expected = gradients(model), gradients(plain)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-7)
    model.eval()
    with torch.no_grad():
        evaluated = model(mixed_batch()).segment_losses
    torch.testing.assert_close(evaluated, plain(mixed_batch()).segment_losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits, loss_tolerance, least_cosine", [(4, 0.05, 0.85), (8, 0.005, 0.999)])
def test_quantised_assets_lose_little(bits: int, loss_tolerance: float, least_cosine: float) -> None:
    """The pretrained tiny ViT and LLaMA, on random text and images."""
    assets = {
        "vision": {"config": {}, "source": "asset://tiny_vit", "tap_every": 2},
        "llm": {"config": {}, "source": "asset://tiny_llama"},
    }
    model, exact = (build_model(tiny_config(bits=number, **assets)) for number in (bits, None))
    size = model.image_size
    batch = mixed_batch()
    batch.pixels = torch.randint(256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours, theirs = model(batch), exact(batch)
    assert 0 < abs(ours.loss_sum.item() / theirs.loss_sum.item() - 1) < loss_tolerance
    for output in (ours, theirs):
        output.loss_sum.backward()
    flat = [torch.cat([p.grad.flatten() for p in m.parameters() if p.requires_grad]) for m in (model, exact)]
    assert torch.cosine_similarity(*flat, dim=0) > least_cosine


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_quantised_is_the_blocks_frozen_linear_layers(bits: int) -> None:
    model = build(bits, llm={"peft": LORA})
    quantised = {name for name, parameter in model.named_parameters() if not parameter.is_floating_point()}
    expected = {
        name
        for name, parameter in model.named_parameters()
        if ".layers." in name and name.endswith("weight") and "norm" not in name and not parameter.requires_grad
    }
    assert quantised == expected and len(quantised) == 7 * LLM["num_hidden_layers"] + 6 * 5
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)
    assert (
        sum(parameter.nbytes for parameter in model.parameters() if parameter.dtype in (torch.uint8, torch.int8))
        == sum(
            parameter.numel()
            for name, parameter in build(None, llm={"peft": LORA}).named_parameters()
            if name in quantised
        )
        * bits
        // 8
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_counts_are_of_numbers_not_of_bytes(bits: int) -> None:
    config = {"llm": {"peft": LORA}}
    model, plain = build(bits, **config), build(None, **config)
    meta = build_model(tiny_config(bits=bits, **config), device="meta")
    assert count_parameters(model) == count_parameters(plain) == count_parameters(meta)
    assert model.flops() == plain.flops() == meta.flops()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("trained, frozen", [("vision", "llm"), ("llm", "vision")])
def test_of_two_networks_the_frozen_one_is_quantised(bits: int, trained: str, frozen: str) -> None:
    model = build(bits, **{trained: {"train": True}})
    dead = "vision.clip.encoder.layers.4."  # after the last tap: frozen whatever is tuned
    names = [
        name
        for name, parameter in model.named_parameters()
        if not parameter.is_floating_point() and not name.startswith(dead)
    ]
    assert {name.split(".")[0] for name in names} == {frozen}
    assert all(gradient is not None for gradient in gradients(model).values())


def test_every_bit_count_has_its_dtypes() -> None:
    for bits, dtype, expected in (
        (None, torch.bfloat16, torch.bfloat16),
        (16, torch.bfloat16, torch.bfloat16),
        (32, torch.bfloat16, torch.float32),
    ):
        model = build(bits, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {expected}
        with torch.autocast("cpu", torch.bfloat16):
            model(mixed_batch()).loss_sum.backward()
    assert (
        choose_dtype("auto", 16) == choose_dtype("bf16", 4) == torch.bfloat16
        and choose_dtype("fp32", 4) == torch.float32
    )
    packed = build(4, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in packed.parameters() if not parameter.requires_grad} == {
        torch.bfloat16,
        torch.int8,
    }
    with torch.autocast("cpu", torch.bfloat16):
        packed(mixed_batch()).loss_sum.backward()


@pytest.mark.parametrize("bits", [4, 8])
def test_merged_it_is_a_plain_network_that_computes_the_same(bits: int) -> None:
    model = build(bits, llm={"peft": LORA}, adapter={"vision": "both", "llm": "both"})
    expected = model(mixed_batch()).segment_losses
    merge_adapters(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model(mixed_batch()).segment_losses, expected, rtol=1e-5, atol=1e-5)


def test_the_same_weights_from_files_and_from_memory(tmp_path: Path) -> None:
    """A folder that a network was written to gives its quantised twin the codes that quantising it in memory gives."""
    plain = build(None, adapter={"llm": "none"})
    plain.llm.save_pretrained(tmp_path)
    model = build(4, llm={"config": {}, "source": str(tmp_path)}, adapter={"llm": "none"})
    for ours, theirs in zip(model.llm.model.layers, plain.llm.model.layers):
        quantise_linears(theirs, 4)
        assert torch.equal(ours.mlp.up_proj.weight, theirs.mlp.up_proj.weight)


def test_contradictions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for choice in ({"tune": "full"}, {"vision": {"train": True}, "llm": {"train": True}}):
        with pytest.raises(InputError, match="model.bits: found 4, but only frozen weights can be quantised"):
            tiny_config(bits=4, **choice)
    config = Config()
    config.model.bits, config.train.precision = 16, "fp32"
    with pytest.raises(
        InputError, match="model.bits: found 16, but bf16 weights make bf16 products and train.precision says fp32"
    ):
        config.__post_init__()
    for version in ("0.49.2", "0.48.0.dev0"):
        monkeypatch.setattr(bitsandbytes(), "__version__", version)
        with pytest.raises(
            InputError, match=f"model.bits: found bitsandbytes {version}, expected 0.50 or newer: .*--with quant"
        ) as refusal:
            outline_model(tiny_config(bits=4))
        assert "\n" not in str(refusal.value)
        monkeypatch.undo()
    for version in ("0.50.0", "1.0"):
        monkeypatch.setattr(bitsandbytes(), "__version__", version)
        assert bitsandbytes().__version__ == version
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="model.bits: 4 and 8 need bitsandbytes .*--with quant"):
        outline_model(tiny_config(bits=8))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("outputs", [64, 128], ids=["square", "not square"])
@pytest.mark.parametrize("bits, tolerance", [(4, 1e-3), (8, 1e-2)])
def test_the_way_that_cuda_takes_is_exact_forward_and_backward(bits: int, tolerance: float, outputs: int) -> None:
    """The library's own product, and the gradient of the dequantised weights. A square matrix taken for its transpose
    would be 1.4 off."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(64, outputs))
    quantise_linears(block, bits)
    linear = block[0]
    weight, bias = linear.dequantised(torch.float32).double(), linear.bias.detach().double()
    x = torch.randn(5, 9, 64, requires_grad=True)
    found = linear.packed_product(
        x.detach(), linear.bias.detach()
    )  # on a CPU the layer itself multiplies by the dequantised weights
    assert relative_error(found, x.double() @ weight.t() + bias) < tolerance
    gradient = torch.randn(5, 9, outputs)
    linear(x).backward(gradient)
    assert relative_error(x.grad, gradient.double() @ weight) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nf4_expands_to_the_dtype_that_is_asked_for(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, with no fp32 copy in between, and to the same numbers but for one rounding."""
    linear = nn.Linear(64, 128)
    block = nn.Sequential(linear)
    quantise_linears(block, 4)
    library, made = sys.modules["bitsandbytes"].functional, []
    expand = library.dequantize_4bit
    monkeypatch.setattr(
        library, "dequantize_4bit", lambda *args, **kwargs: made.append(expand(*args, **kwargs)) or made[-1]
    )
    found, exact = block[0].dequantised(dtype), block[0].dequantised(torch.float32)
    assert [one.dtype for one in made] == [dtype, torch.float32] and found.data_ptr() == made[0].data_ptr()
    assert (found.float() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
