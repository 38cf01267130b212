"""Adapters of a stock model by the fused kernel, the norm before them taken in: values and every gradient are those of
plain operations, in Triton's interpreter or on the GPU that is there."""

from __future__ import annotations

import logging
from typing import Any, Literal

import pytest
import torch
from torch import nn

from tests.models.test_stock import PIECES, shaken
from tests.support.stock import row_of, tiny
from vltrain.config.model.mmt import AdapterConfig
from vltrain.config.model.stock import NetworkConfig
from vltrain.models.adapters.norms import RmsForm, rms_form
from vltrain.models.adapters.table import AdapterThenSublayer
from vltrain.models.build import build_model
from vltrain.models.stock.fold.merge import merged_network
from vltrain.models.stock.norms import _Follower

pytest.importorskip("triton", reason="triton has no package for this machine")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# By family: places that take an RMSNorm in, of tower and LLM.
TAKEN = {
    "llava": (0, 4),
    "smolvlm": (0, 4),
    "qwen3_vl": (0, 6),
    "qwen2_5_vl": (4, 4),
    "gemma3": (0, 4),
    "qwen3_5": (0, 4),
}


def adapted(name: str, impl: Literal["torch", "triton"], **changes: Any) -> Any:
    adapter = AdapterConfig(dim=4, vision="both", llm="both", impl=impl)
    model = build_model(tiny(name, adapter=adapter, **changes))
    shaken(model)
    return model.to(DEVICE)


def taken(blocks: tuple[nn.Module, ...]) -> int:
    found = (child for block in blocks for child in block.children() if isinstance(child, AdapterThenSublayer))
    return sum(child.took_norm for child in found)


@pytest.mark.parametrize(
    "name",
    [
        *("llava", "gemma3", "qwen2_5_vl"),
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("smolvlm", "qwen3_vl", "qwen3_5")),
    ],
)
def test_losses_and_every_gradient_are_those_of_plain_operations(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    plain, fused = adapted(name, "torch"), adapted(name, "triton")
    assert (taken(plain.parts.tower_blocks), taken(plain.parts.decoder_blocks)) == (0, 0)
    assert (taken(fused.parts.tower_blocks), taken(fused.parts.decoder_blocks)) == TAKEN[name]
    assert f"fused adapter kernel, llm: {TAKEN[name][1]} of {TAKEN[name][1]} adapters" in caplog.text
    row = row_of(name, plain.parts.core, PIECES).to(DEVICE)
    expected, found = plain(row), fused(row)
    expected.loss_sum.backward()
    found.loss_sum.backward()
    torch.testing.assert_close(found.segment_losses, expected.segment_losses, rtol=1e-5, atol=1e-5)
    assert [one for one, _ in fused.named_parameters()] == [one for one, _ in plain.named_parameters()]
    for (key, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == (not ours.requires_grad), key
        if theirs.grad is not None:
            off = float((ours.grad - theirs.grad).norm() / theirs.grad.norm())  # pyright: ignore[reportOptionalOperand] as the other
            assert off < 1e-5, f"{key}: {off:.1e}"


def test_a_trained_norm_is_not_taken_in() -> None:
    trained = adapted("gemma3", "triton", llm=NetworkConfig(train=True))
    assert taken(trained.parts.decoder_blocks) == 0
    outline = build_model(tiny("gemma3", adapter=AdapterConfig(impl="triton")), device="meta")
    assert taken(outline.parts.decoder_blocks) == 0


def test_what_is_merged_is_the_same() -> None:
    merged = []
    for impl in ("torch", "triton"):
        model = build_model(
            tiny("gemma3", adapter=AdapterConfig(dim=4, bias=False, vision="both", llm="both", impl=impl))
        )
        shaken(model)
        block = model.parts.decoder_blocks[0]
        merged.append(merged_network(model)[0].state_dict())
        states = torch.ones(1, 64)
        assert not torch.equal(block.input_layernorm(states), states)
    assert merged[0].keys() == merged[1].keys() and all(
        torch.equal(one, merged[1][key]) for key, one in merged[0].items()
    )


class _Gated(nn.Module):
    """Something that is called a norm and does more than the kernel."""

    eps = 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        scaled = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled * torch.sigmoid(scaled)


def test_a_norm_is_told_by_what_it_computes() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    assert rms_form(LlamaRMSNorm(8, eps=1e-5)) == RmsForm(eps=1e-5, offset=0.0)
    assert rms_form(Gemma3RMSNorm(8, eps=1e-6)) == RmsForm(eps=1e-6, offset=1.0)
    assert rms_form(nn.LayerNorm(8)) is None and rms_form(_Gated()) is None
    with torch.device("meta"):
        assert rms_form(Gemma3RMSNorm(8)) == RmsForm(eps=1e-6, offset=1.0)


class _Block(nn.Module):
    """A block whose norm is read by `readers`."""

    def __init__(self, readers: str) -> None:
        super().__init__()
        self.readers = readers
        self.norm, self.attn, self.mlp = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        normed = self.norm(states)
        residual = normed if self.readers == "residual" else states
        given = normed * 1 if self.readers == "copy" else normed
        mixed = self.attn(given)
        assert normed.shape == states.shape
        return residual + (mixed + self.mlp(normed) if self.readers == "both" else mixed)


@pytest.mark.parametrize(
    ("readers", "expected"), [("one", {"attn": "norm"}), ("both", {}), ("residual", {}), ("copy", {})]
)
def test_a_norm_that_something_else_reads_stands_before_nothing(readers: str, expected: dict[str, str]) -> None:
    blocks = (_Block(readers),)
    with _Follower(blocks) as follower:
        blocks[0](torch.ones(2, 4))
    assert follower.found() == (expected,)
