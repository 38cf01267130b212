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
import triton.language as tl
from torch import Tensor

from vltrain.ops.adapter_launch import is_aligned, launches, padded_dim, row_shares

PACK_COLUMNS, FINISH_COLUMNS, FINISH_PARTS = 64, 32, 32


@triton.jit
def _dot(a, b, total, WIDEN: tl.constexpr):
    """total + a b, summed in fp32. Triton's interpreter, which would multiply the bits of bf16 as integers, gets the
    same numbers as fp32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit(do_not_specialize=["h"])
def _pack_kernel(
    down, up, norm_weight, packed, d, h, scale,
    NORM: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """packed[0] = D w, packed[1] = s U^T: [2, H, d] in the products' dtype, zeros below row h."""
    columns = tl.program_id(0) * C + tl.arange(0, C)
    bottleneck = tl.arange(0, H)
    in_columns = columns < d
    inside = (bottleneck[:, None] < h) & in_columns[None, :]
    wide = tl.load(down + bottleneck[:, None] * d + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        wide *= tl.load(norm_weight + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    places = bottleneck[:, None] * d + columns[None, :]
    tl.store(packed + places, wide.to(packed.dtype.element_ty), mask=in_columns[None, :])
    wide = scale * tl.load(up + columns[None, :] * h + bottleneck[:, None], mask=inside, other=0.0).to(tl.float32)
    tl.store(packed + H * d + places, wide.to(packed.dtype.element_ty), mask=in_columns[None, :])


@triton.jit(do_not_specialize=["num_rows", "h"])
def _forward_kernel(
    x,
    norm_weight,
    packed,
    down_bias,
    up_bias,
    y,
    hidden,
    inverse_rms,
    num_rows,
    d,
    h,
    stride_row,
    stride_column,
    scale,
    eps,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = tl.program_id(0) * B + tl.arange(0, B)
    in_rows = rows < num_rows
    bottleneck = tl.arange(0, H)
    x_rows = x + rows[:, None].to(tl.int64) * stride_row
    accumulated = tl.zeros((B, H), tl.float32)
    squares = tl.zeros((B, C), tl.float32)
    for start in tl.range(0, d, C, num_stages=STAGES):
        columns = start + tl.arange(0, C)
        inside = in_rows[:, None] & (columns[None, :] < d)
        z = tl.load(x_rows + columns[None, :] * stride_column, mask=inside, other=0.0)
        weights = tl.load(packed + columns[:, None] + bottleneck[None, :] * d, mask=columns[:, None] < d, other=0.0)
        accumulated = _dot(z.to(weights.dtype), weights, accumulated, WIDEN)
        if NORM:
            wide = z.to(tl.float32)
            squares += wide * wide
    if NORM:
        inverse = tl.rsqrt(tl.sum(squares, axis=1) / d + eps)
        tl.store(inverse_rms + rows, inverse, mask=in_rows)
        accumulated *= inverse[:, None]
    if BIAS:
        accumulated += tl.load(down_bias + bottleneck, mask=bottleneck < h, other=0.0).to(tl.float32)[None, :]
    inner = accumulated.to(packed.dtype.element_ty)
    tl.store(hidden + rows[:, None].to(tl.int64) * H + bottleneck[None, :], inner, mask=in_rows[:, None])
    y_rows = y + rows[:, None].to(tl.int64) * d
    for start in tl.range(0, d, C, num_stages=STAGES):
        columns = start + tl.arange(0, C)
        in_columns = columns < d
        inside = in_rows[:, None] & in_columns[None, :]
        z = tl.load(x_rows + columns[None, :] * stride_column, mask=inside, other=0.0).to(tl.float32)
        weights = tl.load(
            packed + H * d + bottleneck[:, None] * d + columns[None, :], mask=in_columns[None, :], other=0.0
        )
        added = _dot(inner, weights, tl.zeros((B, C), tl.float32), WIDEN)
        if NORM:
            z *= inverse[:, None] * tl.load(norm_weight + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if BIAS:
            z += scale * tl.load(up_bias + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        tl.store(y_rows + columns[None, :], (z + added).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "h"])
def _backward_rows_kernel(
    dy,
    x,
    norm_weight,
    inverse_rms,
    hidden,
    down_bias,
    packed,
    dhidden,
    shared,
    d_down_bias,
    num_rows,
    d,
    h,
    dy_stride_row,
    dy_stride_column,
    stride_row,
    stride_column,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dhidden = s U^T dy, divided by rms under the norm; `shared` = sum(z dz) / (d rms^2), of which dx takes x times
    that; and each block's share of d_down_bias [blocks, H]."""
    block = tl.program_id(0)
    rows = block * B + tl.arange(0, B)
    in_rows = rows < num_rows
    bottleneck = tl.arange(0, H)
    x_rows = x + rows[:, None].to(tl.int64) * stride_row
    dy_rows = dy + rows[:, None].to(tl.int64) * dy_stride_row
    accumulated = tl.zeros((B, H), tl.float32)
    direct = tl.zeros((B, C), tl.float32)  # sum over the width of w x dy
    for start in tl.range(0, d, C, num_stages=STAGES):
        columns = start + tl.arange(0, C)
        in_columns = columns < d
        inside = in_rows[:, None] & in_columns[None, :]
        dy_chunk = tl.load(dy_rows + columns[None, :] * dy_stride_column, mask=inside, other=0.0)
        weights = tl.load(
            packed + H * d + columns[:, None] + bottleneck[None, :] * d, mask=in_columns[:, None], other=0.0
        )
        accumulated = _dot(dy_chunk.to(weights.dtype), weights, accumulated, WIDEN)
        if NORM:
            x_chunk = tl.load(x_rows + columns[None, :] * stride_column, mask=inside, other=0.0)
            weight = tl.load(norm_weight + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
            direct += dy_chunk.to(tl.float32) * weight * x_chunk.to(tl.float32)
    if BIAS:
        tl.store(d_down_bias + block * H + bottleneck, tl.sum(accumulated, axis=0))
    places = rows[:, None].to(tl.int64) * H + bottleneck[None, :]
    if NORM:
        # z dz = z dy + z D^T dhidden, and the sum of the latter is that of (hidden - c) dhidden.
        inner = tl.load(hidden + places, mask=in_rows[:, None], other=0.0).to(tl.float32)
        if BIAS:
            inner -= tl.load(down_bias + bottleneck, mask=bottleneck < h, other=0.0).to(tl.float32)[None, :]
        through = tl.sum(inner * accumulated, axis=1)
        inverse = tl.load(inverse_rms + rows, mask=in_rows, other=0.0)
        tl.store(shared + rows, (tl.sum(direct, axis=1) * inverse + through) * inverse * inverse / d, mask=in_rows)
        accumulated *= inverse[:, None]
    tl.store(dhidden + places, accumulated.to(dhidden.dtype.element_ty), mask=in_rows[:, None])


@triton.jit(do_not_specialize=["num_rows", "share_rows"])
def _backward_columns_kernel(
    dy,
    x,
    norm_weight,
    inverse_rms,
    hidden,
    dhidden,
    shared,
    packed,
    dx,
    d_down,
    d_up,
    d_up_bias,
    num_rows,
    share_rows,
    d,
    dy_stride_row,
    dy_stride_column,
    stride_row,
    stride_column,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    WIDEN: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    STAGES: tl.constexpr,
):
    """C columns of one share of the rows: dx, and that share's part of d_down and d_up [shares, H, d] and d_up_bias
    [shares, d].

    The last rows come first, since what the kernel by rows read last is still in the cache.
    """
    columns = tl.program_id(0) * C + tl.arange(0, C)
    in_columns = columns < d
    share = tl.num_programs(1) - 1 - tl.program_id(1)
    first = share * share_rows
    last = tl.minimum(first + share_rows, num_rows)
    bottleneck = tl.arange(0, H)
    down_sum = tl.zeros((H, C), tl.float32)
    up_sum = tl.zeros((H, C), tl.float32)
    bias_sum = tl.zeros((C,), tl.float32)
    if NORM:
        weight = tl.load(norm_weight + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if NEEDS_DX:
        down_chunk = tl.load(packed + bottleneck[:, None] * d + columns[None, :], mask=in_columns[None, :], other=0.0)
    for start in tl.range(first, last, B, num_stages=STAGES):
        rows = start + tl.arange(0, B)
        in_rows = rows < last
        inside = in_rows[:, None] & in_columns[None, :]
        far = rows[:, None].to(tl.int64)
        dy_chunk = tl.load(dy + far * dy_stride_row + columns[None, :] * dy_stride_column, mask=inside, other=0.0)
        x_chunk = tl.load(x + far * stride_row + columns[None, :] * stride_column, mask=inside, other=0.0)
        hidden_block = tl.load(hidden + far * H + bottleneck[None, :], mask=in_rows[:, None], other=0.0)
        dhidden_block = tl.load(dhidden + far * H + bottleneck[None, :], mask=in_rows[:, None], other=0.0)
        up_sum = _dot(tl.trans(hidden_block), dy_chunk.to(hidden_block.dtype), up_sum, WIDEN)
        down_sum = _dot(tl.trans(dhidden_block), x_chunk.to(dhidden_block.dtype), down_sum, WIDEN)
        wide = dy_chunk.to(tl.float32)
        if BIAS:
            bias_sum += tl.sum(wide, axis=0)
        if NEEDS_DX:
            dz = _dot(dhidden_block, down_chunk, tl.zeros((B, C), tl.float32), WIDEN)
            if NORM:
                dz += tl.load(inverse_rms + rows, mask=in_rows, other=0.0)[:, None] * weight * wide
                dz -= tl.load(shared + rows, mask=in_rows, other=0.0)[:, None] * x_chunk.to(tl.float32)
            else:
                dz += wide
            tl.store(dx + far * d + columns[None, :], dz.to(dx.dtype.element_ty), mask=inside)
    matrix = share.to(tl.int64) * H * d + bottleneck[:, None] * d + columns[None, :]
    tl.store(d_down + matrix, down_sum, mask=in_columns[None, :])
    tl.store(d_up + matrix, up_sum, mask=in_columns[None, :])
    if BIAS:
        tl.store(d_up_bias + share.to(tl.int64) * d + columns, bias_sum, mask=in_columns)


@triton.jit(do_not_specialize=["shares", "blocks", "h"])
def _finish_kernel(
    down_parts, up_parts, up_bias_parts, down_bias_parts, norm_weight, d_down, d_down_bias, d_up, d_up_bias,
    shares, blocks, d, h, scale,
    NORM: tl.constexpr, BIAS: tl.constexpr, C: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Adds the parts up, always in the same order. With biases one more program does so for d_down_bias, each other one
    for its columns."""
    bottleneck = tl.arange(0, H)
    if tl.program_id(0) == tl.cdiv(d, C):
        total = tl.zeros((PARTS, H), tl.float32)
        for start in tl.range(0, blocks, PARTS, num_stages=4):
            part = start + tl.arange(0, PARTS)
            total += tl.load(
                down_bias_parts + part[:, None] * H + bottleneck[None, :], mask=part[:, None] < blocks, other=0.0
            )
        tl.store(d_down_bias + bottleneck, tl.sum(total, axis=0), mask=bottleneck < h)
    else:
        columns = tl.program_id(0) * C + tl.arange(0, C)
        in_columns = columns < d
        down_sum = tl.zeros((H, C), tl.float32)
        up_sum = tl.zeros((H, C), tl.float32)
        bias_sum = tl.zeros((C,), tl.float32)
        matrix = bottleneck[:, None] * d + columns[None, :]
        for share in tl.range(0, shares, num_stages=4):
            places = share * H * d + matrix
            down_sum += tl.load(down_parts + places, mask=in_columns[None, :], other=0.0)
            up_sum += tl.load(up_parts + places, mask=in_columns[None, :], other=0.0)
            if BIAS:
                bias_sum += tl.load(up_bias_parts + share * d + columns, mask=in_columns, other=0.0)
        if NORM:
            down_sum *= tl.load(norm_weight + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        inside = (bottleneck[:, None] < h) & in_columns[None, :]
        tl.store(d_down + matrix, down_sum, mask=inside)
        tl.store(d_up + columns[None, :] * h + bottleneck[:, None], scale * up_sum, mask=inside)
        if BIAS:
            tl.store(d_up_bias + columns, scale * bias_sum, mask=in_columns)


INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)


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
            _pack_kernel[(triton.cdiv(width, PACK_COLUMNS),)](
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
            _forward_kernel[(triton.cdiv(num_rows, launch.rows),)](
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
        _backward_rows_kernel[(blocks,)](
            dy,
            x,
            weight,
            inverse_rms,
            hidden,
            _or_any(down_bias, packed),
            packed,
            dhidden,
            shared,
            parts[3],
            num_rows,
            width,
            dim,
            *strides,
            **constants,
            **by_rows.constants,
        )
        _backward_columns_kernel[(triton.cdiv(width, by_columns.columns), shares)](
            dy,
            x,
            weight,
            inverse_rms,
            hidden,
            dhidden,
            shared,
            packed,
            dx,
            *parts[:3],
            num_rows,
            share_rows,
            width,
            *strides,
            NEEDS_DX=needs_dx,
            **constants,
            **by_columns.constants,
        )
        _finish_kernel[(triton.cdiv(width, FINISH_COLUMNS) + bias,)](
            *parts,
            weight,
            *gradients,
            shares,
            blocks,
            width,
            dim,
            scale,
            NORM=norm,
            BIAS=bias,
            C=FINISH_COLUMNS,
            H=height,
            PARTS=FINISH_PARTS,
        )
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
