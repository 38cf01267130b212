"""Attention over a packed row, which is S segments one after another that must not see each other. Which way it is
computed is chosen in `vltrain.ops.attention_choice`. All are exact:

`flash_attention_N`  flash-attn's variable-length kernel, as transformers calls it; told where segments begin.
`varlen`             torch's own variable-length kernel (from 2.10, on CUDA, in 16 bits), told the same.
`sdpa`               segments of similar length are laid out as a padded batch [S, H, L, D] and go through torch's
                     causal
                     attention. Padding stands at the end, so causality alone hides it and no mask exists. A mask
                     of T x T would cost T / L times the work, and would keep CUDA from its flash kernel.
`eager`              softmax over T x T scores with a mask, in plain operations; to look at, not to train with.

`sdpa` and `varlen` are registered in transformers' own table of attention functions; a call that says nothing of
segments (generation with a key-value cache) goes to transformers' SDPA untouched.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vltrain.ops.transfer import to_device

PACKED_SDPA = "vltrain_packed_sdpa"
PACKED_VARLEN = "vltrain_packed_varlen"
# A segment joins a padded group if it is at least this share of the group's longest: bounds what padding wastes.
MIN_FILL = 0.8


@dataclass(frozen=True)
class Packing:
    """How the segments of a row are laid out as padded groups.

    groups: (number of segments, padded length) of each group; their products sum to P.
    pad     int64 [P]: which token of the row stands in each padded place (the row's token 0 where none does).
    unpad   int64 [T]: in which padded place each token of the row stands.
    is_pad  bool [P, 1, 1]: whether a padded place holds no token.
    """

    groups: tuple[tuple[int, int], ...]
    pad: Tensor
    unpad: Tensor
    is_pad: Tensor


def packing_arguments(
    implementation: str, segment_lengths: Tensor, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Keyword arguments that make a transformers decoder keep the segments of one packed row apart.

    Args:
        implementation: what `vltrain.ops.attention_choice.choose_attention` returned.
        segment_lengths: int64 [S] on the CPU, all positive, summing to T.
        device, dtype: of the hidden states.
    """
    if implementation == "eager":
        allowed = block_causal_mask(segment_lengths).to(device)
        # transformers' eager attention adds its mask to the scores.
        return {"attention_mask": torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)}
    # transformers takes a mask of four dimensions as it is; left out, it would build one of T x T for the functions
    # that are ours.
    is_ours = implementation in (PACKED_SDPA, PACKED_VARLEN)
    no_mask = {"attention_mask": torch.empty(0, 0, 0, 0, dtype=torch.bool, device=device)} if is_ours else {}
    if implementation == PACKED_SDPA:
        return {"packing": pack_segments(segment_lengths, device), **no_mask}
    starts = to_device(F.pad(segment_lengths.cumsum(0), (1, 0)).to(torch.int32), device)
    longest = int(segment_lengths.max())
    return {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
        **no_mask,
    }


def block_causal_mask(segment_lengths: Tensor) -> Tensor:
    """Bool [1, 1, T, T]: may query i see key j? Only within its segment and not after itself."""
    owner = torch.repeat_interleave(torch.arange(len(segment_lengths)), segment_lengths)
    return torch.tril(owner[:, None] == owner[None, :])[None, None]


def pack_segments(segment_lengths: Tensor, device: torch.device | str = "cpu") -> Packing:
    """Groups segments of similar length. Computed once per row, on the CPU; at most two small copies to `device`."""
    starts = (segment_lengths.cumsum(0) - segment_lengths).tolist()
    lengths = segment_lengths.tolist()
    order = sorted(range(len(lengths)), key=lambda segment: -lengths[segment])
    groups: list[tuple[int, int]] = []
    pad: list[Tensor] = []
    unpad = torch.empty(sum(lengths), dtype=torch.int64)
    place = first = 0
    while first < len(order):
        longest = lengths[order[first]]
        last = first
        while last < len(order) and lengths[order[last]] >= MIN_FILL * longest:
            start, length = starts[order[last]], lengths[order[last]]
            row = torch.zeros(longest, dtype=torch.int64)
            row[:length] = torch.arange(start, start + length)
            pad.append(row)
            unpad[start : start + length] = torch.arange(place, place + length)
            place += longest
            last += 1
        groups.append((last - first, longest))
        first = last
    is_pad = torch.ones(place, 1, 1, dtype=torch.bool).index_fill_(0, unpad, False)
    return Packing(
        groups=tuple(groups),
        pad=to_device(torch.cat(pad), device),
        unpad=to_device(unpad, device),
        is_pad=to_device(is_pad, device),
    )


class _Padded(torch.autograd.Function):
    """Tokens [T, H, D] -> padded places [P, H, D]. Both ways are gathers: the gradient of torch's own would add with
    atomics, or wait for the device.

    What stands in padding gets no gradient: causality hides it from every token before it, and what it sees is dropped.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return states.index_select(0, packing.pad)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(0, ctx.packing.unpad), None


class _Unpadded(torch.autograd.Function):
    """Padded places [P, H, D] -> tokens [T, H, D], the padding dropped; see `_Padded`."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return states.index_select(0, packing.unpad)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(0, ctx.packing.pad).masked_fill(ctx.packing.is_pad, 0), None


def packed_sdpa_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for packed rows. `query` [1, H, T, D], `key` and `value` [1, H_kv, T, D].

    Returns: ([1, T, H, D], None).
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert len(query) == 1 and not attention_mask.numel(), "a packed row is a batch of one and needs no mask"
    query, key, value = (
        _Padded.apply(states[0].transpose(0, 1), packing) for states in (query, key, value)
    )  # [P, H, D]
    outputs = []
    start = 0
    for num_segments, length in packing.groups:
        part = slice(start, start + num_segments * length)
        group = [states[part].unflatten(0, (num_segments, length)).transpose(1, 2) for states in (query, key, value)]
        output = F.scaled_dot_product_attention(
            *group, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
        )  # [S, H, L, D]
        outputs.append(output.transpose(1, 2).flatten(0, 1))
        start = part.stop
    return _Unpadded.apply(torch.cat(outputs), packing)[None], None


def packed_varlen_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for packed rows on torch's `varlen_attn`.

    `query` [1, H, T, D], `key` and `value` [1, H_kv, T, D], `cu_seq_lens_q` int32 [S + 1]: where segments begin, and T.

    Returns: ([1, T, H, D], None), in autocast's dtype, or that of `value` without autocast.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert len(query) == 1 and not attention_mask.numel(), "a packed row is a batch of one and needs no mask"
    assert not dropout, "varlen_attn has no dropout"
    # Autocast does not reach into custom operations, and a rotary embedding in fp32 leaves queries and keys in it.
    autocast = torch.is_autocast_enabled(query.device.type)
    dtype = torch.get_autocast_dtype(query.device.type) if autocast else value.dtype
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))  # [T, H, D]
    return causal_varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling)[None], None


def causal_varlen(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scaling: float | None
) -> Tensor:
    """`varlen_attn` as torch 2.10, 2.11 or 2.12 and later have it.

    `query` [T, H, D], `key` and `value` [T, H_kv, D], `starts` int32 [S + 1].

    Returns: [T, H, D].
    """
    attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    offers = _parameters(attend)
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in offers else {"is_causal": True}
    if "scale" in offers:
        options["scale"] = scaling
    else:
        assert scaling is None or math.isclose(scaling, query.shape[-1] ** -0.5), (
            "torch 2.10's varlen_attn knows one scale"
        )
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1 and "enable_gqa" in offers:
        options["enable_gqa"] = True
    elif repeats > 1:
        key, value = (states[:, :, None].expand(-1, -1, repeats, -1).flatten(1, 2) for states in (key, value))
    return attend(query, key, value, starts, starts, longest, longest, **options)


def varlen_is_there() -> bool:
    """Whether this torch has `varlen_attn`."""
    try:
        return hasattr(importlib.import_module("torch.nn.attention.varlen"), "varlen_attn")
    except ImportError:
        return False


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


AttentionInterface.register(PACKED_SDPA, packed_sdpa_forward)
AttentionInterface.register(PACKED_VARLEN, packed_varlen_forward)
for _name in (PACKED_SDPA, PACKED_VARLEN):
    AttentionMaskInterface.register(_name, sdpa_mask)
