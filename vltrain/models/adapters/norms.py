"""Norms that the fused kernel (`vltrain.ops.fused`) takes in: which they are, and how one hands its input on.

Families write RMSNorm in several ways: x / rms(x) * w as LLaMA's, times (1 + w) as Gemma's. Names do not tell, so a
norm is measured: a copy of it is run on numbers. What is something else (LayerNorm, a norm with a gate) stays what it
is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

EPSILONS = ("variance_epsilon", "eps", "epsilon")  # what transformers calls it
OFFSETS = (0.0, 1.0)
SIZES = (1.0, 1e-3)  # of states: at the small one, epsilon shows
TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class RmsForm:
    """z = x / sqrt(mean(x^2) + eps) * (offset + weight)."""

    eps: float
    offset: float

    def weight_of(self, norm: nn.Module) -> Tensor:
        """What x / rms(x) is multiplied by, [d]."""
        weight: Any = norm.weight
        return weight.float() + self.offset if self.offset else weight


@torch.no_grad()
def rms_form(norm: nn.Module) -> RmsForm | None:
    """What a norm computes, in fp32; None where it is no RMSNorm with one weight a channel. On the meta device, too."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or [*norm.state_dict()] != ["weight"]:
        return None
    with torch.device("cpu"):
        probe: Any = copy.deepcopy(norm).to_empty(device="cpu").float()
        draw = torch.Generator().manual_seed(0)
        states = torch.randn(4, len(weight), generator=draw)
        probe.weight.copy_(torch.rand(len(weight), generator=draw) + 0.5)
        for eps in (float(getattr(probe, name)) for name in EPSILONS if getattr(probe, name, None) is not None):
            for form in (RmsForm(eps=eps, offset=offset) for offset in OFFSETS):
                if all(_is(form, probe, size * states) for size in SIZES):
                    return form
    return None


def _is(form: RmsForm, norm: nn.Module, states: Tensor) -> bool:
    try:
        found = type(norm).forward(norm, states)  # not Liger's, which is the instance's
    except TypeError:  # it asks for more than states
        return False
    inverse = torch.rsqrt(states.square().mean(-1, keepdim=True) + form.eps)
    expected = states * inverse * form.weight_of(norm)
    return isinstance(found, Tensor) and torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


class TakenNorm:
    """Mixed into the class of a norm whose only reader is an adapter: hands its input on, and the adapter computes
    `normalise` together with itself. Parameters, names and hooks stay what they are."""

    def forward(self, states: Tensor) -> Tensor:
        return states

    def normalise(self, states: Tensor) -> Tensor:
        """What the norm's own forward makes of states [..., d]."""
        inner: Any = super().forward  # pyright: ignore[reportAttributeAccessIssue] of the class it is mixed into
        return inner(states)


def take(norm: nn.Module) -> None:
    """Makes a norm hand its input on, in place."""
    norm.__class__ = _taken(type(norm))


def give_back(norm: nn.Module) -> None:
    """Makes a norm that was taken compute again, in place."""
    norm.__class__ = type(norm).__mro__[2]


def normalised(norm: nn.Module, states: Tensor) -> Tensor:
    """What a norm makes of states, taken or not."""
    return norm.normalise(states) if isinstance(norm, TakenNorm) else norm(states)


@cache
def _taken(norm: type[nn.Module]) -> type[nn.Module]:
    return type(norm.__name__, (TakenNorm, norm), {"__module__": norm.__module__})
