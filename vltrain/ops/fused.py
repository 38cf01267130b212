"""Where the fused adapter kernel runs: the one place that decides between `vltrain.ops.triton_adapter` and plain
operations.

Triton is imported when it is first needed, since machines without CUDA may lack it. Its interpreter
(TRITON_INTERPRET=1) runs the kernel on a CPU too: to test with, thousands of times slower.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from vltrain.errors import InputError

MAX_DIM = 32  # of the bottleneck: with a wider one the weights' gradients no longer fit into registers
DTYPES = (torch.bfloat16, torch.float32)  # of states, and of results


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_fused(impl: str, states: Tensor, dim: int, dropout: float) -> bool:
    """Whether an adapter with the setting `impl` computes `states` by the kernel.

    Args:
        impl: `auto`, `torch` or `triton` (`require_fused` has let it pass).
        dim, dropout: the adapter's.

    Raises: InputError if `triton` is asked for and the states' dtype, or autocast's, has no kernel.
    """
    if impl == "torch":
        return False
    has_kernel = states.dtype in DTYPES and _out_dtype(states) in DTYPES
    if impl == "triton" and not has_kernel:
        raise InputError(
            "model.adapter.impl: found 'triton', but its kernel does bf16 and fp32, not states in "
            f"{states.dtype} with results in {_out_dtype(states)}; "
            "take auto or torch"
        )
    return impl == "triton" or (states.is_cuda and has_kernel and dim <= MAX_DIM and dropout == 0)


def may_run_fused(impl: str, dim: int, dropout: float) -> bool:
    """Whether states could come for which `runs_fused` is true: with `auto`, of a CUDA device that is here."""
    return impl == "triton" or (impl == "auto" and torch.cuda.is_available() and dim <= MAX_DIM and dropout == 0)


def _out_dtype(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def require_fused(dim: int, dropout: float) -> None:
    """Raises InputError if the kernel was asked for and this machine or adapter cannot have it."""
    if importlib.util.find_spec("triton") is None:
        raise InputError(
            "model.adapter.impl: found 'triton', but the package triton is not installed; take auto or torch"
        )
    if not torch.cuda.is_available() and not interpreted():
        raise InputError("model.adapter.impl: found 'triton', but there is no CUDA device here; take auto or torch")
    if dim > MAX_DIM or dropout > 0:
        raise InputError(
            f"model.adapter.impl: found 'triton', but its kernel does bottlenecks of {MAX_DIM} at most "
            f"(model.adapter.dim = {dim}) without "
            f"dropout (model.adapter.dropout = {dropout}); take auto or torch"
        )


def fused_adapter(
    x: Tensor, down: Tensor, down_bias: Tensor | None, up: Tensor, up_bias: Tensor | None, *,
    scale: float = 1.0, norm_weight: Tensor | None = None, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """z + s (U (D z + c) + b) with z = x, or x / rms(x) * `norm_weight` where that is given.

    Args:
        x: [..., d], bf16 or fp32, any strides.
        down, down_bias: D [h, d] and c [h]; h is `MAX_DIM` at most.
        up, up_bias: U [d, h] and b [d]; both biases are None in an adapter without.
        norm_weight: [d], of an RMSNorm that is not trained; `eps` is its.

    Returns: [..., d], in the dtype of autocast where that is on, else in `x`'s; the products are done in this dtype,
    summed in fp32.
    """
    from vltrain.ops.triton_adapter import EagerAdapter, bottleneck_adapter

    out_dtype = _out_dtype(x)
    assert x.dtype in DTYPES and out_dtype in DTYPES and len(down) <= MAX_DIM, (x.dtype, out_dtype, down.shape)
    rows = x.reshape(-1, x.shape[-1])
    # Only torch.compile and fake tensors have to be told of an operator.
    run = bottleneck_adapter if torch.compiler.is_compiling() or type(rows) is not Tensor else EagerAdapter.apply
    y, *_ = run(rows, norm_weight, down, down_bias, up, up_bias, scale, eps, out_dtype)
    return y.view(x.shape)
