"""Small sizes by the names that transformers' configs give them. What is not named here stays as the config has it:
windows' kinds, scales, softcaps, activations, flags."""

from __future__ import annotations

import re
from typing import Any

from vltrain.models.resized import SIDE

HIDDEN, HEADS, HEAD = 2 * SIDE, 4, 32  # the language model's: width, heads, entries of a head; SIDE: all else's width
FEED, EXPERT, LATENT, STATE = 96, 32, 16, 8
VOCABULARY = 384
WINDOW = 6  # tokens: shorter than the audit's segments, so that it matters
CHUNK = 8

HIDDEN_NAMES = ("hidden_size", "d_model", "n_embd", "dim_model", "embed_dim")
HEAD_NAMES = ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_sliding_attention_heads")
KEY_NAMES = ("num_key_value_heads", "num_kv_heads", "num_query_groups", "multi_query_group_num")
DEPTH_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "num_decoder_layers")
EXPERT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

FIXED: dict[str, int] = {
    "sliding_window": WINDOW,
    "attention_window_size": WINDOW,
    "local_attention": WINDOW,
    "keep_window_size": 2048,
    "attention_chunk_size": CHUNK,
    "floor_scale": CHUNK,
    "mamba_chunk_size": CHUNK,
    "chunk_size": CHUNK,
    "index_topk": CHUNK,
    "index_head_dim": LATENT,
    "index_n_heads": 2,
    "index_kpool": 2,
    "block_multiple_of": LATENT,
    "hidden_size_per_layer_input": STATE,
    "laurel_rank": STATE,
    "adapter_rank": STATE,
    "mamba_d_state": STATE,
    "ssm_state_size": STATE,
    "state_size": STATE,
    "mamba_dt_rank": STATE,
    "time_step_rank": STATE,
    "kv_lora_rank": LATENT,
    "q_lora_rank": LATENT,
    "o_lora_rank": LATENT,
    "qk_nope_head_dim": LATENT,
    "qk_rope_head_dim": LATENT,
    "v_head_dim": LATENT,
    "qk_head_dim": 2 * LATENT,
    "linear_key_head_dim": LATENT,
    "linear_value_head_dim": LATENT,
    "rotary_dim": LATENT,
    "router_hidden_size": LATENT,
    "shared_intermediate_size": FEED,
    "resampler_n_latents": 4,
    "query_length": 4,
    "num_query_tokens": 4,
}
WIDTHS = re.compile(
    r"(out_|projector_|projection_|vision_|text_|llm_|encoder_|mm_|backbone_|merged_|token_)?hidden_size$"
    r"|projection_dim$|(vision_)?output_dim$|projector_(in|out)put_dim$|lru_width$|cross_attention_dim$|embedding_dim$"
    r"|image_token_embed_dim$|out_dim$|n_embed$"
)
FEEDS = re.compile(
    r"d_ff$|.*intermediate_size(_mlp)?$|.*ffn_dim$|ffn_hidden_size$|dim_ff$|n_inner$|dff$|.*ffn_dim_multiplier_$"
)
EXPERT_FEEDS = re.compile(r"(moe|expert|shared).*(intermediate_size|ffn_hidden_size|expert_dim)$")
NO_CHANCE = re.compile(r".*dropout.*|.*_pdrop$|.*layerdrop$|.*jitter_noise$|.*drop_path_rate$|dropout_p$")
TOKENS = re.compile(r".*_(token_)?(id|ids|index|patch_id)$|.*_token_ids$|.*_token_index$")


def heads_of(values: dict[str, Any]) -> int:
    """How many attention heads a level of a config says it has; 1 where it does not."""
    return next((values[name] for name in HEAD_NAMES if isinstance(values.get(name), int)), 1)


def hidden_of(values: dict[str, Any]) -> int | None:
    """A level's own width."""
    return next((values[name] for name in HIDDEN_NAMES if isinstance(values.get(name), int)), None)


def shrink_heads(values: dict[str, Any], *, text: bool) -> dict[str, Any]:
    """Heads, keys' heads and heads' lengths, with grouped, multi-query and plain attention kept, and heads that do not
    sum to the width where they did not."""
    heads, hidden = heads_of(values), hidden_of(values)
    small = HEADS if text else 2
    new: dict[str, Any] = {name: small for name in HEAD_NAMES if isinstance(values.get(name), int)}
    for name in KEY_NAMES:
        keys = values.get(name)
        if isinstance(keys, int):
            new[name] = 1 if keys == 1 else small if keys >= heads else 2
    entries = values.get("head_dim")
    if isinstance(entries, int):
        new["head_dim"] = HEAD
        if isinstance(values.get("qk_rope_head_dim"), int):  # latent attention calls its rotary part so
            new["head_dim"] = LATENT if entries == values["qk_rope_head_dim"] else 2 * LATENT
        elif hidden and entries * heads != hidden:
            new["head_dim"] = HEAD // 2 if entries * heads < hidden else HEAD * 2
    for name in ("global_head_dim", "swa_head_dim", "attention_head_size", "dim_head", "d_head", "d_kv", "kv_channels"):
        if isinstance(values.get(name), int):
            new[name] = HEAD if values[name] == entries or not entries else 2 * HEAD
    return new


def shrink_experts(values: dict[str, Any]) -> dict[str, Any]:
    """Experts, and how many of them a token takes: some, and never all."""
    grouped = (values.get("n_group") or 1) > 1
    new: dict[str, Any] = {}
    for name in EXPERT_NAMES:
        if isinstance(values.get(name), int) and values[name] > 1:
            new[name] = 8 if grouped else 4
    if grouped:
        new |= {"n_group": 2, "topk_group": 1}
    for name in ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts", "num_experts_per_token"):
        if isinstance(values.get(name), int):
            new[name] = min(values[name], 2)
    if isinstance(values.get("zero_expert_num"), int):
        new["zero_expert_num"] = 2
    return new


def shrink_mixers(values: dict[str, Any], hidden: int) -> dict[str, Any]:
    """State-space and linear-attention mixers: heads, groups, and lengths that fit the width."""
    new: dict[str, Any] = {}
    expand = values.get("mamba_expand") or values.get("expand") or 1
    inner = int(expand * hidden)
    if isinstance(values.get("mamba_d_ssm"), int):
        inner = new["mamba_d_ssm"] = hidden
    for heads, length in (
        ("mamba_n_heads", "mamba_d_head"),
        ("mamba_num_heads", "mamba_head_dim"),
        ("n_mamba_heads", "mamba_headdim"),
        ("num_heads", "mamba_head_dim"),
        ("num_heads", "head_dim"),
    ):
        is_mixer = heads != "num_heads" or "state_size" in values
        if is_mixer and isinstance(values.get(heads), int) and (length in values or heads == "n_mamba_heads"):
            new[heads] = 4
            new[length] = inner // 4
            break
    for name in ("mamba_n_groups", "n_groups", "mamba_ngroups"):
        if isinstance(values.get(name), int):
            new[name] = min(values[name], 2)
    key, value = values.get("linear_num_key_heads"), values.get("linear_num_value_heads")
    if isinstance(key, int) and isinstance(value, int):
        new |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4 if value > key else 2}
    if isinstance(values.get("intermediate_size"), int) and "state_size" in values:
        new["intermediate_size"] = inner
    return new


def shrink_rotary(rope: Any, entries: int, factor: float | None) -> Any:
    """Rotary parameters for heads of `entries`: sections of positions and factors of frequencies are cut in proportion,
    everything else stays.

    factor: the share of a head that rotates, where the config says so beside `rope`.
    """
    if not isinstance(rope, dict):
        return rope
    if any(isinstance(value, dict) for value in rope.values()):  # by layer type
        return {kind: shrink_rotary(value, entries, factor) for kind, value in rope.items()}
    new = dict(rope)
    half = int(entries * (rope.get("partial_rotary_factor") or factor or 1.0)) // 2
    if isinstance(rope.get("mrope_section"), list):
        new["mrope_section"] = in_proportion(rope["mrope_section"], half)
    for name in ("long_factor", "short_factor"):
        if isinstance(rope.get(name), list):
            given = rope[name]
            new[name] = [given[place * len(given) // half] for place in range(half)]
    return new


def in_proportion(parts: list[int], total: int) -> list[int]:
    """`parts` cut to sum to `total`, each at least 1 where it was and there is room."""
    live = [place for place, part in enumerate(parts) if part]
    new = [0] * len(parts)
    for place in live[:total]:
        new[place] = 1
    while sum(new) < total:
        # The part that is furthest below its share.
        place = max(live, key=lambda one: parts[one] * total / sum(parts) - new[one])
        new[place] += 1
    return new
