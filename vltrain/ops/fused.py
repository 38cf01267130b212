"""Where the fused adapter kernel runs: the one place that decides between `vltrain.ops.triton_adapter` and plain operations.

Triton is imported when it is first needed, since machines without CUDA may lack it. Its interpreter (TRITON_INTERPRET=1) runs the kernel on
a CPU too: to test with, thousands of times slower.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from vltrain.errors import InputError

MAX_DIM = 32  # of the bottleneck: with a wider one the weights' gradients no longer fit into registers
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_fused(impl: str, states: Tensor, dim: int, dropout: float) -> bool:
    """Whether an adapter with the setting `impl` computes `states` by the kernel.

    Args:
        impl: `auto`, `torch` or `triton` (`require_fused` has let it pass).
        dim, dropout: the adapter's.
    """
    if impl == "torch":
        return False
    return impl == "triton" or (states.is_cuda and states.dtype in DTYPES and dim <= MAX_DIM and dropout == 0)


def require_fused(dim: int, dropout: float) -> None:
    """Raises InputError if the kernel was asked for and this machine or adapter cannot have it."""
    if importlib.util.find_spec("triton") is None:
        raise InputError("model.adapter.impl: found 'triton', but the package triton is not installed; take auto or torch")
    if not torch.cuda.is_available() and not interpreted():
        raise InputError("model.adapter.impl: found 'triton', but there is no CUDA device here; take auto or torch")
    if dim > MAX_DIM or dropout > 0:
        raise InputError(
            f"model.adapter.impl: found 'triton', but its kernel does bottlenecks of {MAX_DIM} at most (model.adapter.dim = {dim}) without "
            f"dropout (model.adapter.dropout = {dropout}); take auto or torch"
        )


def fused_adapter(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, *,
    scale: float = 1.0, norm_weight: Tensor | None = None, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """z + s (U (D z + c) + b) with z = x, or x / rms(x) * `norm_weight` where that is given.

    Args:
        x: [..., d], bf16, fp16 or fp32, any strides.
        down, down_bias: D [h, d] and c [h]; h is `MAX_DIM` at most.
        up, up_bias: U [d, h] and b [d].
        norm_weight: [d], of an RMSNorm that is not trained; `eps` is its.

    Returns: [..., d], in the dtype of autocast where that is on, else in `x`'s.
    """
    from vltrain.ops.triton_adapter import bottleneck_adapter

    assert x.dtype in DTYPES and len(down) <= MAX_DIM, (x.dtype, down.shape)
    device = x.device.type
    out_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    y, _, _ = bottleneck_adapter(x.reshape(-1, x.shape[-1]), norm_weight, down, down_bias, up, up_bias, scale, eps, out_dtype)
    return y.view(x.shape)
