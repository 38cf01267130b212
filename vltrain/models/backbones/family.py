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
    since        the first release of transformers whose modules have the names that are said here; None: all that we
                 support
    lacks        (config) -> what of it is not supported, in words: `KEY: found ..., ...`; None: nothing
    """

    title: str
    model_types: tuple[str, ...]
    config: type[PreTrainedConfig]
    network: type[PreTrainedModel]
    published: Mapping[str, Network] = field(default_factory=dict)
    layouts: tuple[Layout, ...] = ()
    since: str | None = None
    lacks: Callable[[Any], str | None] = lambda config: None


@dataclass(frozen=True, kw_only=True)
class Blocks(Family):
    """A family of transformer blocks: attention and an MLP (`ffn`), each with a residual around it.

    norms      the norm right before each sublayer (attention, ffn) of a block; of post-norm blocks {}, whose adapters
               stand in front of the sublayer itself
    sublayers  the sublayer's module in a block
    readers    the linear layers that read its input; of attention queries, keys and values, in this order, or one for
               all; those that a network of the family lacks are skipped
    writers    the linear layer that ends the sublayer
    bias_switches  the settings of the config that give linear layers of a sublayer their bias. A layer that has none
               can't take in an adapter's constant without one
    """

    norms: Mapping[str, str]
    readers: Mapping[str, tuple[str, ...]]
    writers: Mapping[str, str]
    sublayers: Mapping[str, str] = field(default_factory=lambda: {"attention": "self_attn", "ffn": "mlp"})
    bias_switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def places(self) -> dict[str, str]:
        """By sublayer, the module of a block that an adapter in front of it is put into."""
        return {sublayer: self.norms.get(sublayer, name) for sublayer, name in self.sublayers.items()}

    @property
    def targets(self) -> tuple[str, ...]:
        """Last names of the blocks' linear layers, which low-rank updates may be put into."""
        layers = [layer for sublayer in self.sublayers for layer in (*self.readers[sublayer], self.writers[sublayer])]
        return tuple(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))


@dataclass(frozen=True, kw_only=True)
class Language(Blocks):
    """A family of decoder-only LLMs: `model.embed_tokens`, blocks in `model.layers`, `model.norm`, `lm_head`.

    blip_targets  the linear layers of InstructBLIP's `targets`
    prompts     whether peft's LLaMA-Adapter (adaption_prompt) fits its attention
    liger       whether Liger's kernels (`vltrain.ops.liger`) are of its modules
    """

    blip_targets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prompts: bool = False
    liger: bool = False


@dataclass(frozen=True, kw_only=True)
class Tower(Blocks):
    """A family of vision towers: blocks of a residual stream that `embeddings` begins.

    layers   where its blocks are
    before   the modules in front of the blocks that have parameters, in order; `embeddings` takes pixels
    after    what stands behind the blocks, as far as a network has it
    patch    what maps a patch's pixels
    idle     parameters that no forward reads
    has_cls  whether row 0 is a [cls] state; the others are registers and patches, these row by row
    registers  (config) -> how many registers stand in front of the patches
    embed    (network, pixels fp32 [N, 3, H, W]) -> what the first block reads; None: `before`, one after another
    beside   (network, pixels) -> further arguments of every block, behind states and mask
    cls_of_block  (block, states [N, P, d]) -> row 0 of what a block makes of them, without the other rows; None: there
             is no shorter way than the block
    pool     (network, states [N, P, d] after all blocks) -> its pooler's output [N, d]; None: has no pooler
    image_size  (config) -> edge of the square that it reads, in pixels
    any_size    whether positions fit squares of other sizes too
    processors  image processors that its checkpoints may name, by transformers' names
    mean, std   of red, green and blue in [0, 1], taken out of pixels where a checkpoint says nothing; CLIP's
    whole    of model types that name a whole of tower and text: the class of such a config, of which `vision_config`
             counts
    others   names in files of what is not the tower's
    renamed  names in files, as regular expressions, and what they are called here
    """

    layers: str = "encoder.layers"
    before: tuple[str, ...]
    after: tuple[str, ...]
    patch: str = "embeddings.patch_embedding"
    idle: tuple[str, ...] = ()
    has_cls: bool
    registers: Callable[[Any], int] = lambda config: 0
    embed: Callable[[Any, Tensor], Tensor] | None = None
    beside: Callable[[Any, Tensor], tuple[Any, ...]] = lambda network, pixels: ()
    cls_of_block: Callable[[Any, Tensor], Tensor] | None = None
    pool: Callable[[Any, Tensor], Tensor] | None = None
    image_size: Callable[[Any], int] = lambda config: config.image_size
    any_size: bool = False
    processors: tuple[str, ...] = ()
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    whole: Mapping[str, type[PreTrainedConfig]] = field(default_factory=dict)
    others: re.Pattern[str] = re.compile(r"(?!)")
    renamed: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class EncoderDecoder(Family):
    """A family of encoder-decoders, as InstructBLIP's LLM. `blip_targets`: see `Language`."""

    blip_targets: Mapping[str, tuple[str, ...]]
