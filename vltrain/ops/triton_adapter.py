"""The Bottleneck Adapter in one pass over its input, alone or together with the RMSNorm before it, in Triton.

    forward        z = x, or x / rms(x) * w;   hidden = D z + c;   y = z + s (U hidden + b)
    backward       dhidden = s U^T dy;   dz = dy + D^T dhidden;   dU = s dy^T hidden,  db = s sum dy,  dD = dhidden^T z,
                   dc = sum dhidden

Memory-bound: 4 h d operations a row beside 2 d numbers moved, so what counts is how often states are fetched, and that
fetches never wait for each other: every loop has chunks on their way while it computes. Forward: a program owns a block
of rows. Its first sweep over the width makes `hidden` and the norm's sum of squares; the second, whose reads hit the
cache, writes y. Backward: a kernel by rows makes dhidden and what the norm's gradient needs of a whole row; one by
columns makes dx and the weights' gradients, for one share of the rows a program; one adds the shares up, in a fixed
order and never by atomic additions, so that a run can be repeated bit for bit.

The products are of raw states, as they lie in memory: w is multiplied into D and s into U beforehand (`packed`, once a
call), and 1 / rms comes after the sum. They are in the dtype of the result, which is what autocast gives torch's own
products: bf16 states or fp32 states under bf16 autocast are multiplied as bf16 (`hidden` and dhidden are rounded to it
too), fp32 states without autocast as fp32. Sums are fp32 throughout.
Kept for backward are x, `packed`, `hidden` (h numbers a row, padded to 16 or 32) and 1 / rms (one).

Grouped projections come as the dense matrices that `vltrain.ops.adapter.grouped_matrix` makes of them; of an adapter
without biases c and b are neither read nor written. Trade-off: no dropout, no fp16, no norms
whose own weight is trained.

Shape legend: N rows, d width, h bottleneck. Programs: B rows a block, C columns a chunk, H: h rounded up to a power of
two, 16 at least.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vltrain.ops import adapter_kernels
from vltrain.ops.adapter_launch import is_aligned, launches, padded_dim, row_shares

PACK_COLUMNS, FINISH_COLUMNS, FINISH_PARTS = 64, 32, 32
INTERPRETED = not isinstance(adapter_kernels.forward_kernel, triton.JITFunction)


def run_forward(
    x: Tensor,
    norm_weight: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: float,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y [N, d], hidden [N, H], 1 / rms [N] fp32, empty without a norm, packed [2, H, d]); all but 1 / rms in
    `out_dtype`, bf16 or fp32.
    Both biases are given, or none."""
    assert (down_bias is None) == (up_bias is None), "the kernel knows an adapter with both biases, and one without"
    num_rows, width = x.shape
    dim = len(down)
    outputs = y, hidden, inverse_rms, packed = _empty_outputs(x, norm_weight, dim, out_dtype)
    norm, weight = norm_weight is not None, norm_weight.contiguous() if norm_weight is not None else x
    launch = launches(x.dtype, out_dtype, packed.shape[1], is_aligned(x))["forward"]
    if num_rows:
        with torch.cuda.device_of(x):
            adapter_kernels.pack_kernel[(triton.cdiv(width, PACK_COLUMNS),)](
                down.contiguous(),
                up.contiguous(),
                weight,
                packed,
                width,
                dim,
                scale,
                NORM=norm,
                C=PACK_COLUMNS,
                H=packed.shape[1],
            )
            adapter_kernels.forward_kernel[(triton.cdiv(num_rows, launch.rows),)](
                x,
                weight,
                packed,
                _or_any(down_bias, packed),
                _or_any(up_bias, packed),
                y,
                hidden,
                inverse_rms,
                num_rows,
                width,
                dim,
                *x.stride(),
                scale,
                eps,
                NORM=norm,
                BIAS=down_bias is not None,
                WIDEN=INTERPRETED,
                H=packed.shape[1],
                **launch.constants,
            )
    return outputs


def _or_any(bias: Tensor | None, other: Tensor) -> Tensor:
    """A tensor for an argument that the kernel does not read where there is no bias."""
    return other if bias is None else bias.contiguous()


def _empty_outputs(
    x: Tensor, norm_weight: Tensor | None, dim: int, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, width = x.shape
    height = padded_dim(dim)
    shapes = (x.shape, (num_rows, height), (num_rows if norm_weight is not None else 0,), (2, height, width))
    dtypes = (out_dtype, out_dtype, torch.float32, out_dtype)
    return tuple(x.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))


bottleneck_adapter = torch.library.custom_op("vltrain::bottleneck_adapter", run_forward, mutates_args=())


@bottleneck_adapter.register_fake
def _(x, norm_weight, down, down_bias, up, up_bias, scale, eps, out_dtype):
    return _empty_outputs(x, norm_weight, len(down), out_dtype)


def run_backward(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    inverse_rms: Tensor,
    hidden: Tensor,
    packed: Tensor,
    down_bias: Tensor | None,
    dim: int,
    scale: float,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx [N, d] in x's dtype, or empty; dD [h, d], dc [h], dU [d, h], db [d] in fp32; dc and db empty without
    biases)."""
    (num_rows, width), height, bias = x.shape, packed.shape[1], down_bias is not None
    dx, *gradients = _empty_gradients(x, dim, bias, needs_dx)
    if not num_rows:
        return dx, *(gradient.zero_() for gradient in gradients)
    ours = launches(x.dtype, packed.dtype, height, is_aligned(x, dy))
    by_rows, by_columns = ours["backward rows"], ours["backward columns"]
    blocks, (shares, share_rows) = triton.cdiv(num_rows, by_rows.rows), row_shares(num_rows, width, by_columns)
    norm, weight = norm_weight is not None, norm_weight.contiguous() if norm_weight is not None else x
    dhidden, shared = torch.empty_like(hidden), torch.empty_like(inverse_rms)
    parts = [
        x.new_empty(shape, dtype=torch.float32)
        for shape in ((shares, height, width), (shares, height, width), (shares, width), (blocks, height))
    ]
    strides = (*dy.stride(), *x.stride())
    constants = {"NORM": norm, "BIAS": bias, "WIDEN": INTERPRETED, "H": height}
    with torch.cuda.device_of(x):
        # fmt: off
        adapter_kernels.backward_rows_kernel[(blocks,)](
            dy, x, weight, inverse_rms, hidden, _or_any(down_bias, packed), packed, dhidden, shared, parts[3],
            num_rows, width, dim, *strides, **constants, **by_rows.constants,
        )
        adapter_kernels.backward_columns_kernel[(triton.cdiv(width, by_columns.columns), shares)](
            dy, x, weight, inverse_rms, hidden, dhidden, shared, packed, dx, *parts[:3],
            num_rows, share_rows, width, *strides, NEEDS_DX=needs_dx, **constants, **by_columns.constants,
        )
        adapter_kernels.finish_kernel[(triton.cdiv(width, FINISH_COLUMNS) + bias,)](
            *parts, weight, *gradients, shares, blocks, width, dim, scale,
            NORM=norm, BIAS=bias, C=FINISH_COLUMNS, H=height, PARTS=FINISH_PARTS,
        )
        # fmt: on
    return dx, *gradients


def _empty_gradients(x: Tensor, dim: int, bias: bool, needs_dx: bool) -> tuple[Tensor, ...]:
    width = x.shape[1]
    dx = x.new_empty(x.shape if needs_dx else (0, width))
    # Not products with `bias`: in a traced graph sizes are symbols, which torch 2.11 does not multiply by a bool.
    biases = (dim, width) if bias else (0, 0)
    return dx, *(
        x.new_empty(shape, dtype=torch.float32) for shape in ((dim, width), (biases[0],), (width, dim), (biases[1],))
    )


bottleneck_adapter_backward = torch.library.custom_op(
    "vltrain::bottleneck_adapter_backward", run_backward, mutates_args=()
)


@bottleneck_adapter_backward.register_fake
def _(dy, x, norm_weight, inverse_rms, hidden, packed, down_bias, dim, scale, needs_dx):
    return _empty_gradients(x, dim, down_bias is not None, needs_dx)


def _keep_for_backward(ctx, inputs, output) -> None:
    x, norm_weight, down, down_bias, up, up_bias, scale, _, _ = inputs
    _, hidden, inverse_rms, packed = output
    ctx.mark_non_differentiable(hidden, inverse_rms, packed)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, norm_weight, inverse_rms, hidden, packed, down_bias)
    ctx.dim, ctx.scale, ctx.dtypes = (
        len(down),
        scale,
        [None if weight is None else weight.dtype for weight in (down, down_bias, up, up_bias)],
    )


def _backward(ctx, dy, run):
    if dy is None:
        return (None,) * 9
    assert not ctx.needs_input_grad[1], "a norm whose weight is trained has no fused kernel"
    needs_dx = ctx.needs_input_grad[0]
    dx, *weights = run(dy, *ctx.saved_tensors, ctx.dim, ctx.scale, needs_dx)
    gradients = (
        None if dtype is None else gradient.to(dtype) for gradient, dtype in zip(weights, ctx.dtypes, strict=True)
    )
    return (dx if needs_dx else None, None, *gradients, None, None, None)


bottleneck_adapter.register_autograd(
    lambda ctx, dy, *_: _backward(ctx, dy, bottleneck_adapter_backward), setup_context=_keep_for_backward
)


class EagerAdapter(torch.autograd.Function):
    """The operator `bottleneck_adapter` for tensors that are real: torch's way to an operator of Python takes the host
    longer than its kernels do."""

    @staticmethod
    def forward(ctx, *inputs):
        outputs = run_forward(*inputs)
        _keep_for_backward(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx, dy, *_):
        return _backward(ctx, dy, run_backward)
