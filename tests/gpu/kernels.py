"""Kernels, losses and attention against float64 on the device: outputs and gradients, every dtype, sizes that fit
blocks and sizes that do not."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from tests.gpu.part import Findings, relative_error, run_part
from vltrain.errors import InputError
from vltrain.models.materialise import empty_model
from vltrain.ops.attention import packing_arguments
from vltrain.ops.attention_choice import choose_attention
from vltrain.ops.fused import DTYPES, fused_adapter
from vltrain.ops.loss import linear_cross_entropy

# ||found - exact|| / ||exact||: operands rounded to 8 bits of mantissa lose up to 4e-3 each, fp16's to 11 bits 5e-4,
# fp32's products (never TF32's) are near 1e-6.
LIMITS = {torch.bfloat16: 1.5e-2, torch.float16: 4e-3, torch.float32: 2e-5}
INTERPRETED = 3.0  # times that: Triton's interpreter cuts bits off where a GPU rounds
# Rows, width, bottleneck.
SIZES = ((5, 64, 3), (33, 257, 16), (70, 1000, 17), (512, 768, 4), (2560, 4096, 16), (2561, 5120, 32))
ATTENTIONS = ("sdpa", "varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4")
SEGMENTS = (1, 37, 128, 5, 300, 64, 9)


def find(findings: Findings) -> None:
    torch.manual_seed(0)
    for dtype in LIMITS:
        for rows, width, dim in () if dtype not in DTYPES else SIZES[:2] if findings.emulate else SIZES:
            for norm, bias in ((False, True), (True, True), (True, False)):
                what = f"adapter {rows} x {width}, dim {dim}, {dtype}, norm {norm}, bias {bias}"
                findings.attempt(what, lambda: _adapter(findings, rows, width, dim, dtype, norm, bias))
        for rows, width, vocabulary in ((7, 48, 131),) if findings.emulate else ((7, 48, 131), (1500, 2048, 32000)):
            findings.attempt(f"loss in {dtype}", lambda: _loss(findings, rows, width, vocabulary, dtype))
    for dtype in (torch.bfloat16, torch.float32):
        for attention in ATTENTIONS:
            for kv_heads in (8, 2):
                _attention(findings, attention, dtype, kv_heads)
    if not findings.emulate:
        findings.attempt("repeatability", lambda: _repeatable(findings))


def _worst(found: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[str, float]:
    """Name and error of what is furthest off; a NaN is further than anything."""
    errors = {name: relative_error(found[name], exact[name]) for name in exact}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return worst, errors[worst]


def _compare(
    findings: Findings, kernel: str, size: str, dtype: torch.dtype, found: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    worst, error = _worst(found, exact)
    limit = LIMITS[dtype] * (INTERPRETED if findings.emulate else 1)
    findings.check(
        "against float64", error, limit, kernel=kernel, size=size, dtype=str(dtype).removeprefix("torch."), worst=worst
    )


def _adapter(findings: Findings, rows: int, width: int, dim: int, dtype: torch.dtype, norm: bool, bias: bool) -> None:
    shapes = {
        "x": (rows, width),
        "down": (dim, width),
        "up": (width, dim),
        **({"down_bias": (dim,), "up_bias": (width,)} if bias else {}),
    }
    values = {name: torch.randn(shape, device=findings.device) for name, shape in shapes.items()}
    values["down"] *= width**-0.5
    values["x"] = values["x"].to(dtype)
    weight = (torch.rand(width, device=findings.device) + 0.5).to(dtype) if norm else None
    upstream = torch.randn(rows, width, device=findings.device).to(dtype)

    def run(exact: bool) -> dict[str, Tensor]:
        leaves = {name: (value.double() if exact else value.clone()).requires_grad_() for name, value in values.items()}
        x, down, up = leaves["x"], leaves["down"], leaves["up"]
        down_bias, up_bias = leaves.get("down_bias"), leaves.get("up_bias")
        if exact:
            z = x if weight is None else x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
            y = z + 0.5 * F.linear(F.linear(z, down, down_bias), up, up_bias)
        else:
            y = fused_adapter(x, down, down_bias, up, up_bias, scale=0.5, norm_weight=weight, eps=1e-6)
        y.backward(upstream.double() if exact else upstream)
        return {"y": y, **{f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}}

    _compare(
        findings,
        f"fused adapter{' with norm' if norm else ''}{'' if bias else ', without biases'}",
        f"{rows} x {width}, {dim}",
        dtype,
        run(False),
        run(True),
    )


def _loss(findings: Findings, rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> None:
    hidden = torch.randn(rows, width, device=findings.device).to(dtype)
    weight = (torch.randn(vocabulary, width, device=findings.device) * width**-0.5).to(dtype)
    labels = torch.randint(vocabulary, (rows,), device=findings.device)

    def run(exact: bool) -> dict[str, Tensor]:
        states, matrix = ((value.double() if exact else value.clone()).requires_grad_() for value in (hidden, weight))
        loss = (
            F.cross_entropy(states @ matrix.t(), labels, reduction="sum")
            if exact
            else linear_cross_entropy(states, matrix, labels, 2**20)[0]
        )
        loss.backward()
        return {"loss": loss, "gradient of states": states.grad, "gradient of weight": matrix.grad}

    _compare(findings, "head and loss", f"{rows} x {width} x {vocabulary}", dtype, run(False), run(True))


def _config(kv_heads: int) -> LlamaConfig:
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": kv_heads,
        "vocab_size": 8,
    }
    return LlamaConfig(**sizes)


def _llama(kv_heads: int, attention: str) -> LlamaModel:
    torch.manual_seed(1)
    model = empty_model(LlamaModel, _config(kv_heads), attention)
    model.to_empty(device="cpu")
    model.rotary_emb = type(model.rotary_emb)(model.config)  # `to_empty` empties its frequencies as well
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.04) if parameter.ndim == 2 else torch.nn.init.ones_(parameter)
    return model


def _attention(findings: Findings, attention: str, dtype: torch.dtype, kv_heads: int) -> None:
    """A block of LLaMA on one packed row beside eager attention in float64; what cannot run here says why."""
    device, lengths = findings.device, torch.tensor(SEGMENTS)
    try:
        implementation = choose_attention(attention, _config(kv_heads), device, dtype)
    except InputError as error:
        if kv_heads == 8:
            findings.row(
                "attention that is not run here",
                attention=attention,
                dtype=str(dtype).removeprefix("torch."),
                reason=str(error)[:200],
            )
        return
    embeds = torch.randn(1, int(lengths.sum()), 512, generator=torch.Generator().manual_seed(2)).to(device)
    positions = torch.cat([torch.arange(length) for length in SEGMENTS])[None].to(device)

    def run(name: str, kind: torch.dtype) -> dict[str, Tensor]:
        model = _llama(kv_heads, name).to(device, kind)
        states = embeds.to(dtype).to(kind).clone().requires_grad_()
        arguments = packing_arguments(name, lengths, device, kind)
        hidden = model(inputs_embeds=states, position_ids=positions, use_cache=False, **arguments).last_hidden_state
        hidden.backward(torch.ones_like(hidden) * torch.linspace(-1, 1, 512, device=device, dtype=kind))
        return {
            "states": hidden,
            "gradient of input": states.grad,
            "gradient of k": model.layers[0].self_attn.k_proj.weight.grad,
        }

    def compare() -> None:
        limit = {torch.bfloat16: 3e-2, torch.float32: 2e-5}[dtype]
        worst, error = _worst(run(implementation, dtype), run("eager", torch.float64))
        told = {
            "attention": attention,
            "runs": implementation,
            "dtype": str(dtype).removeprefix("torch."),
            "kv_heads": kv_heads,
            "worst": worst,
        }
        findings.check("attention of packed rows against float64", error, limit, **told)

    findings.attempt(f"attention {attention} in {dtype}", compare)


def _repeatable(findings: Findings) -> None:
    """The kernel's gradients twice: atomics would show as differing bits."""
    x = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = [torch.randn(shape, device="cuda").requires_grad_() for shape in ((16, 4096), (16,), (4096, 16), (4096,))]
    norm, upstream = torch.ones(4096, device="cuda", dtype=torch.bfloat16), torch.randn_like(x)
    runs = [
        torch.autograd.grad(fused_adapter(x, *weights, norm_weight=norm), [x, *weights], upstream) for _ in range(3)
    ]
    same = all(torch.equal(one, other) for run in runs[1:] for one, other in zip(runs[0], run, strict=True))
    findings.row("repeatability", kernel="fused adapter with norm, 8192 x 4096, dim 16, bf16", runs=3, bit_for_bit=same)
    findings.require(same, "the fused adapter's gradients differ from run to run")


if __name__ == "__main__":
    sys.exit(run_part("kernels", find, __doc__))
