"""Which tokenizers a recipe names."""

from __future__ import annotations

from vltrain.config.schema import Config
from vltrain.data.text.instruction import InstructionSource


def tokenizer_sources(config: Config) -> tuple[str, InstructionSource | None]:
    """Where the LLM's tokenizer is, and that of what reads the prompt beside it where there is one: the arguments of
    `load_tokenizer`."""
    places = config.model.tokenizers
    if places.instruction is None:
        return places.source, None
    subfolder, most = places.instruction_subfolder, places.instruction_tokens
    return places.source, InstructionSource(source=places.instruction, subfolder=subfolder, max_tokens=most)
