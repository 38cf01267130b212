"""What a family of stock models (`config.model_type` of transformers') needs said, where its config and its processor
do not say it in a form that all families share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Family:
    """The defaults are right for a family without a word of its own.

    model_types          of transformers' config, that this is said of
    blocks               which tokens see each other both ways. images: those of one image; prefix: all in front of the
                         answer, images included; None: none, the LLM is causal throughout
    block_rule           in which layers they do, and how far back: see `vltrain.ops.packed.packing.BlockRule`
    first_position       of each segment's first token, for families that don't count from 0
    token_type_argument  the forward's argument that says which tokens are an image's, to be given in every forward
                         without packing: left out, transformers computes something else and doesn't say so
    chat_template        Jinja, for a processor that brings none; None: such a processor is refused
    refused              why these models can't be trained, in words that end the sentence "NAME: ..."; None: they can
    """

    model_types: tuple[str, ...] = ()
    blocks: Literal["images", "prefix"] | None = None
    block_rule: Literal["within_window", "over_window", "windowed_layers"] = "within_window"
    first_position: int = 0
    token_type_argument: str | None = None
    chat_template: str | None = None
    refused: str | None = None
