"""Which tokenizers a recipe names."""

from __future__ import annotations

from vltrain.config.schema import Config
from vltrain.data.text.instruction import SUBFOLDER, InstructionSource


def tokenizer_sources(config: Config) -> tuple[str, InstructionSource | None]:
    """Where the LLM's tokenizer is, and the Q-Former's where there is one: the arguments of `load_tokenizer`."""
    if config.model.architecture == "mmt":
        source = config.model.llm.tokenizer or config.model.llm.source
        assert source is not None, "LLMConfig asks for one of them"
        return source, None
    blip = config.model.instructblip
    source, read_with = blip.tokenizer or blip.source, blip.qformer_tokenizer or blip.source
    assert source is not None and read_with is not None, "InstructBlipConfig asks for them"
    subfolder = "" if blip.qformer_tokenizer else SUBFOLDER
    return source, InstructionSource(source=read_with, subfolder=subfolder, max_tokens=blip.qformer_tokens)
