"""Attention over a packed row: the one place that chooses how it is computed.

A packed row is S segments one after another that must not see each other. Three ways, all exact:

`flash_attention_2`  flash-attn's variable-length kernel; told where segments begin.
`sdpa`               segments of similar length are laid out as a padded batch [S, H, L, D] and go through torch's causal
                     attention. Padding stands at the end, so causality alone hides it and no mask exists. A mask
                     of T x T would cost T / L times the work, and would keep CUDA from its flash kernel.
`eager`              softmax over T x T scores with a mask, in plain operations; to look at, not to train with.

The `sdpa` way is registered in transformers' own table of attention functions; a call without a `packing` (generation with a
key-value cache) goes to transformers' SDPA untouched.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vltrain.errors import InputError

logger = logging.getLogger(__name__)

PACKED_SDPA = "vltrain_packed_sdpa"
# A segment joins a padded group if it is at least this share of the group's longest: bounds what padding wastes.
MIN_FILL = 0.8


@dataclass(frozen=True)
class Packing:
    """How the segments of a row are laid out as padded groups.

    groups: (number of segments, padded length) of each group; their products sum to P.
    pad     int64 [P]: which token of the row stands in each padded place (the row's token 0 where none does).
    unpad   int64 [T]: in which padded place each token of the row stands.
    """

    groups: tuple[tuple[int, int], ...]
    pad: Tensor
    unpad: Tensor


def choose_attention(requested: str, device: torch.device | str, key: str = "model.llm.attention") -> str:
    """Settles `auto` of the setting `key` and returns transformers' name of the implementation, logging the choice.

    An outline on the meta device runs nowhere, so that it may be asked for anything and stands for it with `sdpa`.

    Raises: InputError if flash_attention_2 is asked for where it cannot run.
    """
    if torch.device(device).type == "meta":
        return "eager" if requested == "eager" else PACKED_SDPA
    on_cuda = torch.device(device).type == "cuda"
    has_flash = importlib.util.find_spec("flash_attn") is not None
    if requested == "flash_attention_2" and not (on_cuda and has_flash):
        missing = "the package flash-attn is not installed" if on_cuda else f"the model is on '{device}'"
        raise InputError(
            f"{key}: found 'flash_attention_2', but {missing}; it needs a CUDA device and "
            "`pip install flash-attn`. Use 'auto' or 'sdpa'"
        )
    if requested == "auto":
        requested = "flash_attention_2" if on_cuda and has_flash else "sdpa"
    logger.info("attention of packed rows: %s", requested)
    return PACKED_SDPA if requested == "sdpa" else requested


def packing_arguments(implementation: str, segment_lengths: Tensor, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments that make a transformers decoder keep the segments of one packed row apart.

    Args:
        implementation: what `choose_attention` returned.
        segment_lengths: int64 [S] on the CPU, all positive, summing to T.
        device, dtype: of the hidden states.
    """
    if implementation == PACKED_SDPA:
        # transformers takes a mask of four dimensions as it is; left out, it would build one of T x T.
        no_mask = torch.empty(0, 0, 0, 0, dtype=torch.bool, device=device)
        return {"packing": pack_segments(segment_lengths, device), "attention_mask": no_mask}
    if implementation == "eager":
        allowed = block_causal_mask(segment_lengths).to(device)
        # transformers' eager attention adds its mask to the scores.
        return {"attention_mask": torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)}
    starts = F.pad(segment_lengths.cumsum(0), (1, 0)).to(device, torch.int32, non_blocking=True)
    longest = int(segment_lengths.max())
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


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
    return Packing(
        groups=tuple(groups),
        pad=torch.cat(pad).to(device, non_blocking=True),
        unpad=unpad.to(device, non_blocking=True),
    )


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
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    assert len(query) == 1 and not attention_mask.numel(), "a packed row is a batch of one and needs no mask"
    query, key, value = (states[0].transpose(0, 1).index_select(0, packing.pad) for states in (query, key, value))  # [P, H, D]
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
    return torch.cat(outputs).index_select(0, packing.unpad)[None], None


AttentionInterface.register(PACKED_SDPA, packed_sdpa_forward)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
