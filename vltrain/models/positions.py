"""How many positions a language model was made for."""

from __future__ import annotations

from typing import Any

_STRETCHED = ("linear", "dynamic")  # their max_position_embeddings are those from before


def max_positions(config: Any) -> int | None:
    """The longest sequence, in tokens, that a LLaMA of that config was made for, scaled rotary positions included;
    None: no bound.

    A T5's positions are relative and have none. Of scaled ones, `linear` and `dynamic` stretch
    `max_position_embeddings` by their factor, and `yarn` what it calls original; `llama3` and `longrope` state the
    whole length already. As vLLM reads them (`_get_and_verify_max_len`).
    """
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None:
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor") or 1.0
    if kind in _STRETCHED:
        return int(longest * factor)
    if kind == "yarn":
        return max(longest, int((rope.get("original_max_position_embeddings") or longest) * factor))
    return longest
