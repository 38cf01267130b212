"""The kernels of `vltrain.ops.triton_adapter`, which says what they compute; every one checks its bounds itself.

Shape legend: N rows, d width, h bottleneck. Programs: B rows a block, C columns a chunk, H: h rounded up to a power of
two, 16 at least.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, total, WIDEN: tl.constexpr):
    """total + a b, summed in fp32. Triton's interpreter, which would multiply the bits of bf16 as integers, gets the
    same numbers as fp32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit(do_not_specialize=["h"])
def pack_kernel(
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
def forward_kernel(
    x, norm_weight, packed, down_bias, up_bias, y, hidden, inverse_rms, num_rows, d, h, stride_row, stride_column,
    scale, eps,
    NORM: tl.constexpr, BIAS: tl.constexpr, WIDEN: tl.constexpr, B: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
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
        accumulated = dot(z.to(weights.dtype), weights, accumulated, WIDEN)
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
        added = dot(inner, weights, tl.zeros((B, C), tl.float32), WIDEN)
        if NORM:
            z *= inverse[:, None] * tl.load(norm_weight + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if BIAS:
            z += scale * tl.load(up_bias + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        tl.store(y_rows + columns[None, :], (z + added).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "h"])
def backward_rows_kernel(
    dy, x, norm_weight, inverse_rms, hidden, down_bias, packed, dhidden, shared, d_down_bias, num_rows, d, h,
    dy_stride_row, dy_stride_column, stride_row, stride_column,
    NORM: tl.constexpr, BIAS: tl.constexpr, WIDEN: tl.constexpr, B: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
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
        accumulated = dot(dy_chunk.to(weights.dtype), weights, accumulated, WIDEN)
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
def backward_columns_kernel(
    dy, x, norm_weight, inverse_rms, hidden, dhidden, shared, packed, dx, d_down, d_up, d_up_bias, num_rows,
    share_rows, d, dy_stride_row, dy_stride_column, stride_row, stride_column,
    NORM: tl.constexpr, BIAS: tl.constexpr, NEEDS_DX: tl.constexpr, WIDEN: tl.constexpr, B: tl.constexpr, C:
    tl.constexpr, H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
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
        up_sum = dot(tl.trans(hidden_block), dy_chunk.to(hidden_block.dtype), up_sum, WIDEN)
        down_sum = dot(tl.trans(dhidden_block), x_chunk.to(dhidden_block.dtype), down_sum, WIDEN)
        wide = dy_chunk.to(tl.float32)
        if BIAS:
            bias_sum += tl.sum(wide, axis=0)
        if NEEDS_DX:
            dz = dot(dhidden_block, down_chunk, tl.zeros((B, C), tl.float32), WIDEN)
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
def finish_kernel(
    down_parts, up_parts, up_bias_parts, down_bias_parts, norm_weight, d_down, d_down_bias, d_up, d_up_bias, shares,
    blocks, d, h, scale,
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
