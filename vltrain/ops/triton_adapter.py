"""The Bottleneck Adapter in one pass over its input, alone or together with the RMSNorm before it, in Triton.

    forward        z = x, or x / rms(x) * w;   hidden = D z + c;   y = z + s (U hidden + b)
    backward       dhidden = s U^T dy;   dz = dy + D^T dhidden;   dU = s dy^T hidden,  db = s sum dy,  dD = dhidden^T z,  dc = sum dhidden

Memory-bound: 4 h d operations a row beside 2 d numbers moved. So what counts is that each state is fetched once from the device's memory.
Forward: a program owns a block of rows. Its first sweep over the width makes `hidden` (and the norm's sum of squares: D z = D (x w) / rms(x),
so both come of one sweep); the second, whose reads hit the cache, writes y. Unfused, torch reads and writes the states twice more for the
norm and twice more for the adapter. Backward goes by bands of rows that the cache holds: over each, a kernel by rows makes dhidden (and what the
norm's gradient needs of a whole row), then one by columns reads the same rows again, from the cache, for dx and for the weights'
gradients. These add up in a fixed order, through partial sums and never by atomic additions, so that a run can be repeated bit for bit.
Kept for backward are x, `hidden` (h numbers a row) and 1 / rms (one).

States may be bf16, fp16 or fp32; weights are fp32 (or any of these) and products accumulate in fp32. Grouped projections come as the dense
matrices that `vltrain.ops.adapter.grouped_matrix` makes of them. What it gives up: dropout, and norms whose own weight is trained.

Shape legend: N rows, d width, h bottleneck. Programs: B rows a block, C columns a chunk, H: h rounded up to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 32
CHUNK_COLUMNS = 128
MIN_DOT = 16  # the smallest side of Triton's matrix products
BAND_BYTES = 16 * 2**20  # of dy and x together that the two kernels of backward read one after the other: less than half of an A100's cache
TARGET_PROGRAMS = 128  # of the kernel by columns: about one for each multiprocessor
BACKWARD_WARPS = 8  # with four, the rows' kernel spills registers where it goes through the norm


@triton.jit
def _load_chunk(base, rows, columns, stride_row, stride_column, in_rows, d):
    """x[rows, columns] in fp32, zeros outside."""
    places = base + rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column
    return tl.load(places, mask=in_rows[:, None] & (columns[None, :] < d), other=0.0).to(tl.float32)


@triton.jit
def _load_down(down, bottleneck, columns, d, h):
    """D[bottleneck, columns]: [H, C] of D [h, d], contiguous, fp32."""
    mask = (bottleneck[:, None] < h) & (columns[None, :] < d)
    return tl.load(down + bottleneck[:, None] * d + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_up(up, bottleneck, columns, d, h):
    """U^T[bottleneck, columns]: [H, C] of U [d, h], contiguous, fp32."""
    mask = (bottleneck[:, None] < h) & (columns[None, :] < d)
    return tl.load(up + columns[None, :] * h + bottleneck[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    x, norm_weight, down, down_bias, up, up_bias, y, hidden, inverse_rms,
    num_rows, d, h, stride_row, stride_column, scale, eps,
    NORM: tl.constexpr, PRECISION: tl.constexpr, B: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * B + tl.arange(0, B)
    in_rows = rows < num_rows
    bottleneck = tl.arange(0, H)
    accumulated = tl.zeros((B, H), tl.float32)
    squares = tl.zeros((B,), tl.float32)
    for start in range(0, d, C):
        columns = start + tl.arange(0, C)
        z = _load_chunk(x, rows, columns, stride_row, stride_column, in_rows, d)
        if NORM:
            squares += tl.sum(z * z, axis=1)
            z *= tl.load(norm_weight + columns, mask=columns < d, other=0.0).to(tl.float32)[None, :]
        accumulated += tl.dot(z, tl.trans(_load_down(down, bottleneck, columns, d, h)), input_precision=PRECISION)
    if NORM:
        inverse = tl.rsqrt(squares / d + eps)
        tl.store(inverse_rms + rows, inverse, mask=in_rows)
        accumulated *= inverse[:, None]
    accumulated += tl.load(down_bias + bottleneck, mask=bottleneck < h, other=0.0).to(tl.float32)[None, :]
    in_hidden = in_rows[:, None] & (bottleneck[None, :] < h)
    tl.store(hidden + rows[:, None].to(tl.int64) * h + bottleneck[None, :], accumulated, mask=in_hidden)
    for start in range(0, d, C):
        columns = start + tl.arange(0, C)
        z = _load_chunk(x, rows, columns, stride_row, stride_column, in_rows, d)
        if NORM:
            z *= inverse[:, None] * tl.load(norm_weight + columns, mask=columns < d, other=0.0).to(tl.float32)[None, :]
        added = tl.dot(accumulated, _load_up(up, bottleneck, columns, d, h), input_precision=PRECISION)
        added += tl.load(up_bias + columns, mask=columns < d, other=0.0).to(tl.float32)[None, :]
        places = y + rows[:, None].to(tl.int64) * d + columns[None, :]
        tl.store(places, (z + scale * added).to(y.dtype.element_ty), mask=in_rows[:, None] & (columns[None, :] < d))


@triton.jit
def _backward_rows_kernel(
    dy, x, norm_weight, inverse_rms, hidden, down_bias, up, dhidden, shared,
    first_row, last_row, d, h, dy_stride_row, dy_stride_column, stride_row, stride_column, scale,
    NORM: tl.constexpr, PRECISION: tl.constexpr, B: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """dhidden = s U^T dy of rows first_row to last_row; with the norm also `shared` = sum(z dz) / (d rms^2), of which dx takes x times that."""
    rows = first_row + tl.program_id(0) * B + tl.arange(0, B)
    in_rows = rows < last_row
    bottleneck = tl.arange(0, H)
    accumulated = tl.zeros((B, H), tl.float32)
    direct = tl.zeros((B,), tl.float32)  # sum over the width of w x dy
    for start in range(0, d, C):
        columns = start + tl.arange(0, C)
        dy_chunk = _load_chunk(dy, rows, columns, dy_stride_row, dy_stride_column, in_rows, d)
        accumulated += tl.dot(dy_chunk, tl.trans(_load_up(up, bottleneck, columns, d, h)), input_precision=PRECISION)
        if NORM:
            weight = tl.load(norm_weight + columns, mask=columns < d, other=0.0).to(tl.float32)[None, :]
            direct += tl.sum(dy_chunk * weight * _load_chunk(x, rows, columns, stride_row, stride_column, in_rows, d), axis=1)
    accumulated *= scale
    in_hidden = in_rows[:, None] & (bottleneck[None, :] < h)
    places = rows[:, None].to(tl.int64) * h + bottleneck[None, :]
    tl.store(dhidden + places, accumulated, mask=in_hidden)
    if NORM:
        # z dz = z dy + z D^T dhidden, and the sum of the latter is that of (hidden - c) dhidden.
        bias = tl.load(down_bias + bottleneck, mask=bottleneck < h, other=0.0).to(tl.float32)[None, :]
        through = tl.sum((tl.load(hidden + places, mask=in_hidden, other=0.0) - bias) * accumulated, axis=1)
        inverse = tl.load(inverse_rms + rows, mask=in_rows, other=0.0)
        tl.store(shared + rows, (direct * inverse + through) * inverse * inverse / d, mask=in_rows)


@triton.jit
def _backward_columns_kernel(
    dy, x, norm_weight, inverse_rms, hidden, dhidden, shared, down, dx, d_down, d_up, d_up_bias,
    first_row, last_row, rows_per_share, d, h, dy_stride_row, dy_stride_column, stride_row, stride_column, scale,
    NORM: tl.constexpr, NEEDS_DX: tl.constexpr, PRECISION: tl.constexpr, B: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """C columns of one share of the rows: dx, and what they add to that share's d_down and d_up [shares, h, d] and d_up_bias [shares, d]."""
    columns = tl.program_id(0) * C + tl.arange(0, C)
    share = tl.program_id(1)
    first = first_row + share * rows_per_share
    last = tl.minimum(first + rows_per_share, last_row)
    bottleneck = tl.arange(0, H)
    matrix = share.to(tl.int64) * h * d + bottleneck[:, None] * d + columns[None, :]
    in_matrix = (bottleneck[:, None] < h) & (columns[None, :] < d)
    bias_places = d_up_bias + share.to(tl.int64) * d + columns
    down_sum = tl.load(d_down + matrix, mask=in_matrix, other=0.0)
    up_sum = tl.load(d_up + matrix, mask=in_matrix, other=0.0)
    bias_sum = tl.load(bias_places, mask=columns < d, other=0.0)
    if NORM:
        weight = tl.load(norm_weight + columns, mask=columns < d, other=0.0).to(tl.float32)[None, :]
    if NEEDS_DX:
        down_chunk = _load_down(down, bottleneck, columns, d, h)
    for start in range(first, last, B):
        rows = start + tl.arange(0, B)
        in_rows = rows < last
        places = rows[:, None].to(tl.int64) * h + bottleneck[None, :]
        in_hidden = in_rows[:, None] & (bottleneck[None, :] < h)
        dy_chunk = _load_chunk(dy, rows, columns, dy_stride_row, dy_stride_column, in_rows, d)
        x_chunk = _load_chunk(x, rows, columns, stride_row, stride_column, in_rows, d)
        z = x_chunk
        if NORM:
            inverse = tl.load(inverse_rms + rows, mask=in_rows, other=0.0)[:, None]
            z = x_chunk * inverse * weight
        dhidden_block = tl.load(dhidden + places, mask=in_hidden, other=0.0)
        up_sum += scale * tl.dot(tl.trans(tl.load(hidden + places, mask=in_hidden, other=0.0)), dy_chunk, input_precision=PRECISION)
        down_sum += tl.dot(tl.trans(dhidden_block), z, input_precision=PRECISION)
        bias_sum += scale * tl.sum(dy_chunk, axis=0)
        if NEEDS_DX:
            dz = dy_chunk + tl.dot(dhidden_block, down_chunk, input_precision=PRECISION)
            if NORM:
                dz = inverse * weight * dz - tl.load(shared + rows, mask=in_rows, other=0.0)[:, None] * x_chunk
            in_chunk = in_rows[:, None] & (columns[None, :] < d)
            tl.store(dx + rows[:, None].to(tl.int64) * d + columns[None, :], dz.to(dx.dtype.element_ty), mask=in_chunk)
    tl.store(d_down + matrix, down_sum, mask=in_matrix)
    tl.store(d_up + matrix, up_sum, mask=in_matrix)
    tl.store(bias_places, bias_sum, mask=columns < d)


def block_sizes(dim: int) -> dict[str, int]:
    """The kernels' constants for a bottleneck of `dim`."""
    return {"B": BLOCK_ROWS, "C": CHUNK_COLUMNS, "H": max(MIN_DOT, triton.next_power_of_2(dim))}


def input_precision(dtype: torch.dtype) -> str:
    """Of the products: TF32's 10 bits hold all of bf16's 7 and fp16's 10; fp32 states get fp32 products."""
    return "ieee" if dtype == torch.float32 else "tf32"


def bands(num_rows: int, width: int, item_bytes: int, chunk: int) -> tuple[int, int, int]:
    """(rows of a band, shares that it is cut into, rows of a share), the rows in multiples of `BLOCK_ROWS`; by shapes alone."""
    rows = max(1, BAND_BYTES // (2 * width * item_bytes * BLOCK_ROWS)) * BLOCK_ROWS
    rows = min(rows, triton.cdiv(num_rows, BLOCK_ROWS) * BLOCK_ROWS)
    shares = min(max(1, TARGET_PROGRAMS // triton.cdiv(width, chunk)), rows // BLOCK_ROWS)
    return rows, shares, triton.cdiv(triton.cdiv(rows, shares), BLOCK_ROWS) * BLOCK_ROWS


@torch.library.custom_op("vltrain::bottleneck_adapter", mutates_args=())
def bottleneck_adapter(
    x: Tensor, norm_weight: Tensor | None, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, scale: float, eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y [N, d], hidden [N, h] fp32, 1 / rms [N] fp32, empty without a norm)."""
    num_rows, width = x.shape
    dim = len(down)
    y, hidden, inverse_rms = _empty_outputs(x, norm_weight, dim, out_dtype)
    sizes = block_sizes(dim)
    if num_rows:
        _forward_kernel[(triton.cdiv(num_rows, sizes["B"]),)](
            x, norm_weight if norm_weight is not None else x, down.contiguous(), down_bias.contiguous(), up.contiguous(), up_bias.contiguous(),
            y, hidden, inverse_rms, num_rows, width, dim, *x.stride(), scale, eps,
            NORM=norm_weight is not None, PRECISION=input_precision(x.dtype), **sizes,
        )  # fmt: skip
    return y, hidden, inverse_rms


def _empty_outputs(x: Tensor, norm_weight: Tensor | None, dim: int, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = len(x)
    fp32 = {"dtype": torch.float32}
    return (
        x.new_empty(x.shape, dtype=out_dtype), x.new_empty(num_rows, dim, **fp32), x.new_empty(num_rows if norm_weight is not None else 0, **fp32)
    )  # fmt: skip


@bottleneck_adapter.register_fake
def _(x, norm_weight, down, down_bias, up, up_bias, scale, eps, out_dtype):
    return _empty_outputs(x, norm_weight, len(down), out_dtype)


@torch.library.custom_op("vltrain::bottleneck_adapter_backward", mutates_args=())
def bottleneck_adapter_backward(
    dy: Tensor, x: Tensor, norm_weight: Tensor | None, inverse_rms: Tensor, hidden: Tensor, down: Tensor, down_bias: Tensor, up: Tensor,
    scale: float, needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx [N, d] or empty, dD [h, d], dc [h], dU [d, h], db [d]), all but dx in fp32."""
    num_rows, width = x.shape
    dim = len(down)
    sizes = block_sizes(dim)
    norm, precision = norm_weight is not None, input_precision(x.dtype)
    weight = norm_weight if norm_weight is not None else x
    dx = x.new_empty(x.shape if needs_dx else (0, width))
    if not num_rows:
        return (dx, *(torch.zeros(shape, device=x.device) for shape in ((dim, width), (dim,), (width, dim), (width,))))
    dhidden, shared = torch.empty_like(hidden), torch.empty_like(inverse_rms)
    down, down_bias, up = down.contiguous(), down_bias.contiguous(), up.contiguous()
    band, shares, share_rows = bands(num_rows, width, x.element_size(), sizes["C"])
    d_down, d_up = (hidden.new_zeros(shares, dim, width) for _ in range(2))
    d_up_bias = hidden.new_zeros(shares, width)
    strides = (*dy.stride(), *x.stride())
    for first in range(0, num_rows, band):
        last = min(first + band, num_rows)
        _backward_rows_kernel[(triton.cdiv(last - first, sizes["B"]),)](
            dy, x, weight, inverse_rms, hidden, down_bias, up, dhidden, shared, first, last, width, dim, *strides, scale,
            NORM=norm, PRECISION=precision, num_warps=BACKWARD_WARPS, **sizes,
        )  # fmt: skip
        _backward_columns_kernel[(triton.cdiv(width, sizes["C"]), shares)](
            dy, x, weight, inverse_rms, hidden, dhidden, shared, down, dx, d_down, d_up, d_up_bias, first, last, share_rows, width, dim,
            *strides, scale, NORM=norm, NEEDS_DX=needs_dx, PRECISION=precision, num_warps=BACKWARD_WARPS, **sizes,
        )  # fmt: skip
    return dx, d_down.sum(0), dhidden.sum(0), d_up.sum(0).t().contiguous(), d_up_bias.sum(0)


@bottleneck_adapter_backward.register_fake
def _(dy, x, norm_weight, inverse_rms, hidden, down, down_bias, up, scale, needs_dx):
    dim, width = down.shape
    shapes = ((dim, width), (dim,), (width, dim), (width,))
    return (x.new_empty(x.shape if needs_dx else (0, width)), *(hidden.new_empty(shape) for shape in shapes))


def _keep_for_backward(ctx, inputs, output) -> None:
    x, norm_weight, down, down_bias, up, up_bias, scale, _, _ = inputs
    _, hidden, inverse_rms = output
    ctx.mark_non_differentiable(hidden, inverse_rms)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, norm_weight, down, down_bias, up, hidden, inverse_rms)
    ctx.scale, ctx.up_bias_dtype = scale, up_bias.dtype


def _run_backward(ctx, dy, *_):
    x, norm_weight, down, down_bias, up, hidden, inverse_rms = ctx.saved_tensors
    if dy is None:
        return (None,) * 9
    assert not ctx.needs_input_grad[1], "a norm whose weight is trained has no fused kernel"
    needs_dx = ctx.needs_input_grad[0]
    dx, *weights = bottleneck_adapter_backward(dy, x, norm_weight, inverse_rms, hidden, down, down_bias, up, ctx.scale, needs_dx)
    dtypes = (down.dtype, down_bias.dtype, up.dtype, ctx.up_bias_dtype)
    return (dx if needs_dx else None, None, *(gradient.to(dtype) for gradient, dtype in zip(weights, dtypes, strict=True)), None, None, None)


bottleneck_adapter.register_autograd(_run_backward, setup_context=_keep_for_backward)

