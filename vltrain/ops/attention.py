"""Attention over a packed row, which is S segments one after another that must not see each other. Which way it is
computed is chosen in `vltrain.ops.attention_choice`. All are exact:

`flash_attention_N`  flash-attn's variable-length kernel, as transformers calls it; told where segments begin.
`varlen`             torch's own variable-length kernel (from 2.10, on CUDA, in 16 bits), told the same.
`sdpa`               segments of similar length are laid out as a padded batch [S, H, L, D] and go through torch's
                     causal attention. Padding stands at the end, so causality alone hides it, and no mask exists where
                     a layer asks for none: a mask of T x T would cost T / L times the work, and keep CUDA from its
                     flash kernel. Sliding windows, chunks and blocks get a mask of L x L; a softcap or sinks, which
                     torch's attention does not know, are computed in plain operations.
`tiled`              rows of queries at a time against the keys that they see, on CPUs (`vltrain.ops.packed.tiled`).
                     Knows all that `sdpa` does but dropout; rows that SDPA computes faster go to it.
`eager`              softmax over T x T scores with a mask, in plain operations; to look at, not to train with.

`sdpa`, `tiled` and `varlen` are registered in transformers' own table of attention functions; a call that says nothing
of segments (generation with a key-value cache) goes to transformers' own attention. An argument that could change what
attention computes and is not known here is an error.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from vltrain.errors import InputError
from vltrain.ops.packed.masks import PACKED_SDPA, PACKED_TILED, PACKED_VARLEN, SegmentMask, row_mask, segment_mask
from vltrain.ops.packed.packing import BlockRule, Packing, from_padded, to_padded
from vltrain.ops.packed.tiled import Scores, tiled_attention, tiles_of, worth_tiling

Forward = Callable[..., tuple[Tensor, None]]
WITHOUT_EFFECT = frozenset({
    "packing", "position_ids", "position_embeddings", "cache", "cache_position", "past_key_values", "use_cache",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "num_items_in_batch",
})  # fmt: skip
"""Names of arguments that transformers' layers hand on to an attention function and that change nothing there."""


@dataclass(frozen=True)
class _Softmax:
    """How scores become weights; see `_of_packed_rows`."""

    dropout: float
    scaling: float | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def is_plain(self) -> bool:
        """Whether torch's attention knows it."""
        return self.softcap is None and self.sinks is None


def packing_arguments(
    implementation: str,
    segment_lengths: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    *,
    blocks: Tensor | None = None,
    block_rule: BlockRule = "within_window",
) -> dict[str, Any]:
    """Keyword arguments that make a transformers decoder (`vltrain.models.backbones.packed_decoder`) keep the segments
    of one packed row apart.

    Args:
        implementation: what `vltrain.ops.attention_choice.choose_attention` returned.
        segment_lengths: int64 [S] on the CPU, all positive, summing to T.
        device, dtype: of the hidden states.
        blocks: int64 [T] on the CPU, or [0] or None for no blocks: tokens of a segment that have one number from 0 on
            see each other both ways. Of ours, `sdpa`, `tiled` and `eager` can do that.
        block_rule: in which layers they do.
    """
    if blocks is not None and not len(blocks):
        blocks = None
    packing = Packing(segment_lengths, device, blocks, block_rule)
    if implementation in (PACKED_SDPA, PACKED_TILED, "eager"):
        return {"packing": packing, "attention_mask": row_mask(packing)}
    assert blocks is None, f"{implementation} cannot show blocks both ways"
    if implementation == PACKED_VARLEN:
        return {"packing": packing, "attention_mask": row_mask(packing)}
    return {
        "packing": packing,
        "cu_seq_lens_q": packing.starts,
        "cu_seq_lens_k": packing.starts,
        "max_length_q": packing.longest,
        "max_length_k": packing.longest,
    }


def _of_packed_rows(attend: Callable[[Tensor, Tensor, Tensor, SegmentMask, _Softmax], Tensor]) -> Forward:
    """transformers' attention function that computes packed rows by `attend`: (`query` [1, H, T, D], `key` and `value`
    [1, H_kv, T, D], mask, how scores become weights) -> [1, T, H, D]."""

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """For packed rows; `query` [1, H, T, D], `key` and `value` [1, H_kv, T, D].

        Args:
            attention_mask: what `vltrain.ops.packed.masks` made of the row's; anything else means that no row is
                packed.
            sliding_window: as the mask has it.
            softcap: scores s become softcap * tanh(s / softcap).
            s_aux: [H], logits of an imagined key without value, one a head (sinks).

        Returns: ([1, T, H, D], None); of tiles and `varlen` in autocast's dtype, or that of `value` without autocast.

        Raises: InputError for an argument that is not known here.
        """
        how = _Softmax(dropout, scaling, softcap, s_aux)
        mask = _checked_mask(attention_mask, sliding_window, kwargs)
        if mask is None:
            return _unpacked(module, query, key, value, attention_mask, how, kwargs)
        assert len(query) == 1, "a packed row is a batch of one"
        return attend(query, key, value, mask, how), None

    return forward


def _tiled_attention(query: Tensor, key: Tensor, value: Tensor, mask: SegmentMask, how: _Softmax) -> Tensor:
    """On a CPU, in tiles where those are faster than padded groups."""
    assert not how.dropout, "tiles have no dropout"
    dtype = _product_dtype(value)
    if how.is_plain and not worth_tiling(mask, query.shape[-1], dtype):
        return _grouped_attention(query, key, value, mask, how)
    query, key, value = (states[0].to(dtype) for states in (query, key, value))
    scores = Scores(query.shape[-1] ** -0.5 if how.scaling is None else how.scaling, how.softcap)
    return tiled_attention(query, key, value, tiles_of(mask), scores, how.sinks).to(dtype)[None]


def _grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: SegmentMask, how: _Softmax) -> Tensor:
    """Attention of a packed row by padded groups: `query` [1, H, T, D], `key` and `value` [1, H_kv, T, D] -> [1, T, H,
    D]."""
    packing = mask.packing
    query, key, value = (to_padded(states[0].transpose(0, 1), packing) for states in (query, key, value))  # [P, H, D]
    outputs = []
    for (part, num_segments, length), allowed in zip(packing.parts(), mask.group_masks(), strict=True):
        q, k, v = (states[part].unflatten(0, (num_segments, length)).transpose(1, 2) for states in (query, key, value))
        output = _group_attention(q, k, v, allowed, how)  # [S, H, L, D]
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return from_padded(torch.cat(outputs), packing)[None]


def _group_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, how: _Softmax) -> Tensor:
    """Attention of a padded group: `query` [S, H, L, D], `key` and `value` [S, H_kv, L, D] -> [S, H, L, D]."""
    if not how.is_plain:
        if allowed is None:
            allowed = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril()
        return _attention(query, key, value, allowed, how)
    repeats = query.shape[1] // key.shape[1]
    if allowed is not None and repeats > 1:
        # With a mask and fewer heads of keys CUDA would have its slow kernel alone.
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=allowed,
        dropout_p=how.dropout,
        is_causal=allowed is None,
        scale=how.scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )


def _checked_mask(attention_mask: Any, sliding_window: int | None, more: dict[str, Any]) -> SegmentMask | None:
    """The mask of a packed row; None where no row is packed.

    Raises: InputError for an argument that is not known here.
    """
    mask = segment_mask(attention_mask)
    if mask is None:
        assert more.get("packing") is None, "a packed row whose mask did not reach the attention"
        return None
    unknown = {name for name, given in more.items() if name not in WITHOUT_EFFECT and given is not None}
    if more.get("is_causal") is True:
        unknown.discard("is_causal")
    if unknown:
        raise InputError(
            f"this LLM's attention asks for {', '.join(sorted(unknown))}, which packed rows cannot be given; "
            "expected attention with a mask, a sliding window, a softcap or sinks alone"
        )
    if sliding_window is not None and (mask.rule.kind, mask.rule.size) != ("window", sliding_window):
        raise InputError(
            f"this LLM's attention asks for a sliding window of {sliding_window}, its mask for {mask.rule}; packed "
            "rows need both to say the same"
        )
    return mask


def _unpacked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    how: _Softmax,
    more: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attention over a padded batch, or with a key-value cache: [B, H, L, D] -> ([B, L, H, D], None)."""
    if how.is_plain:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=how.dropout, scaling=how.scaling, **more
        )
    if attention_mask is None:  # as transformers' SDPA takes it: causal, or one query that sees all
        lengths = (query.shape[2], key.shape[2])
        attention_mask = torch.ones(lengths, dtype=torch.bool, device=query.device).tril(lengths[1] - lengths[0])
    return _attention(query, key, value, attention_mask, how).transpose(1, 2).contiguous(), None


def _attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, how: _Softmax) -> Tensor:
    """Attention in plain operations, the softmax in fp32 at least. `query` [B, H, L, D], `key` and `value` [B, H_kv, K,
    D], `allowed` bool, broadcast to [B, H, L, K] -> [B, H, L, D]."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if how.scaling is None else how.scaling)
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # Of a number, not of minus infinity: where a padded row sees nothing, that would make NaNs of its states.
    wide = wide.masked_fill(~allowed, torch.finfo(wide.dtype).min)
    if how.sinks is not None:
        sinks = how.sinks.to(wide.dtype).view(1, -1, 1, 1).expand(len(wide), -1, wide.shape[2], 1)
        wide = torch.cat([wide, sinks], dim=-1)
    weights = wide.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return F.dropout(weights, how.dropout, training=how.dropout > 0) @ value


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, mask: SegmentMask, how: _Softmax) -> Tensor:
    """By torch's `varlen_attn`."""
    assert not how.dropout, "varlen_attn has no dropout"
    assert how.is_plain and mask.rule.kind != "chunk", "varlen_attn knows windows alone"
    dtype = _product_dtype(value)
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))  # [T, H, D]
    packing = mask.packing
    window = mask.rule.size if mask.rule.kind == "window" else None
    return causal_varlen(query, key, value, packing.starts, packing.longest, how.scaling, window)[None]


def _product_dtype(value: Tensor) -> torch.dtype:
    """That of autocast, which does not reach into custom operations: a rotary embedding in fp32 leaves queries and keys
    in it."""
    autocast = torch.is_autocast_enabled(value.device.type)
    return torch.get_autocast_dtype(value.device.type) if autocast else value.dtype


def causal_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None = None,
) -> Tensor:
    """`varlen_attn` as torch 2.10, 2.11 or 2.12 and later have it.

    `query` [T, H, D], `key` and `value` [T, H_kv, D], `starts` int32 [S + 1], `window` as `sliding_window`, the token
    itself included.

    Returns: [T, H, D].
    """
    attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    offers = _parameters(attend)
    back = -1 if window is None else window - 1
    options: dict[str, Any] = {"window_size": (back, 0)} if "window_size" in offers else {"is_causal": True}
    assert window is None or "window_size" in offers, "torch 2.10's varlen_attn has no windows"
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


def varlen_offers(option: str | None = None) -> bool:
    """Whether this torch has `varlen_attn`, and that with an argument `option`."""
    try:
        attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return False
    return option is None or option in _parameters(attend)


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


packed_sdpa_forward = _of_packed_rows(_grouped_attention)
packed_tiled_forward = _of_packed_rows(_tiled_attention)
packed_varlen_forward = _of_packed_rows(_varlen_attention)
FORWARDS: Mapping[str, Forward] = {
    PACKED_SDPA: packed_sdpa_forward,
    PACKED_TILED: packed_tiled_forward,
    PACKED_VARLEN: packed_varlen_forward,
}
"""Ours, by the names in transformers' table."""
for _name, _forward in FORWARDS.items():
    AttentionInterface.register(_name, _forward)
