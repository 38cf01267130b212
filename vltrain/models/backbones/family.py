"""What is said of a family of networks of transformers, once: a frozen value a family, in a file of its own.

Adding a family is such a file and a line in `vltrain.models.backbones.table`. Names are those of transformers' modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from vltrain.models.materialise import Weights


@dataclass(frozen=True)
class Network:
    """A published network: its sizes as transformers' config has them, and parts of names (letters and digits alone)
    that mean it."""

    config: dict[str, Any]
    aliases: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Its makers' own layout of weights, beside Hugging Face's.

    is_it    whether a place (a path, or a hub's name) is one
    config   (key, path, kind) -> its sizes. `kind`: what the recipe says beside the path, see `model.vision.kind`
    weights  (key, path, empty network) -> its weights
    """

    is_it: Callable[[str], bool]
    config: Callable[[str, Path, str | None], PreTrainedConfig]
    weights: Callable[[str, Path, Any], Weights]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What all families have.

    title        in words, for errors
    model_types  those of a config.json; the first is its config's own
    config, network  transformers' classes
    published    sizes to plan with
    layouts      its makers' own
    """

    title: str
    model_types: tuple[str, ...]
    config: type[PreTrainedConfig]
    network: type[PreTrainedModel]
    published: Mapping[str, Network] = field(default_factory=dict)
    layouts: tuple[Layout, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Blocks(Family):
    """A family of pre-norm transformer blocks.

    norms    the norm before each sublayer (attention, ffn) of a block
    readers  the linear layers that read it; of attention queries, keys and values, in this order
    writers  the linear layer that ends the sublayer
    attention  the attention in a block
    """

    norms: Mapping[str, str]
    readers: Mapping[str, tuple[str, ...]]
    writers: Mapping[str, str]
    attention: str = "self_attn"


@dataclass(frozen=True, kw_only=True)
class Language(Blocks):
    """A family of decoder-only LLMs: `model.embed_tokens`, blocks in `model.layers`, `model.norm`, `lm_head`.

    bias_switches  the setting of its config that gives all linear layers of a sublayer a bias; a sublayer without one
                   can't take in an adapter's constant
    targets        last names of the blocks' linear layers, which LoRA may update
    sublayers      the linear layers of InstructBLIP's `targets`
    prompts        whether peft's LLaMA-Adapter (adaption_prompt) fits its attention
    liger          whether Liger's kernels (`vltrain.ops.liger`) are of its modules
    """

    bias_switches: Mapping[str, str] = field(default_factory=dict)
    targets: tuple[str, ...]
    sublayers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prompts: bool = False
    liger: bool = False


@dataclass(frozen=True, kw_only=True)
class Tower(Blocks):
    """A family of vision towers: blocks in `encoder.layers`, of a residual stream that `embeddings` begins.

    before   what the states go through in front of the blocks, in order; `embeddings` takes pixels
    after    what stands behind the blocks
    has_cls  whether row 0 is a [cls] state; the others are patches, row by row
    pool     (network, states [N, P, d] after all blocks) -> its pooler's output [N, d]; None: has no pooler
    whole    of model types that name a whole of tower and text: the class of such a config, of which `vision_config`
             counts
    others   names in files of what is not the tower's
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    has_cls: bool
    pool: Callable[[Any, Tensor], Tensor] | None = None
    whole: Mapping[str, type[PreTrainedConfig]] = field(default_factory=dict)
    others: re.Pattern[str] = re.compile(r"(?!)")


@dataclass(frozen=True, kw_only=True)
class EncoderDecoder(Family):
    """A family of encoder-decoders, as InstructBLIP's LLM. `sublayers`: see `Language`."""

    sublayers: Mapping[str, tuple[str, ...]]
