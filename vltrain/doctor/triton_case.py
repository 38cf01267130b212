"""A Triton kernel of a few lines: does Triton compile, load and run here? Imported only where the package is there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _scaled_exp_kernel(x_at, y_at, num_elements, scale, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_at + places, mask=places < num_elements)
    tl.store(y_at + places, scale * tl.exp(x), mask=places < num_elements)


def scaled_exp(x: Tensor, scale: float) -> Tensor:
    """scale * exp(x) of an fp32 vector."""
    y = torch.full_like(x, float("nan"))
    _scaled_exp_kernel[(triton.cdiv(len(x), 256),)](x, y, len(x), scale, BLOCK=256)
    return y
