"""What every architecture gives: a network (`VisionLanguageModel`), and how it is built from a recipe (`Architecture`).

Whoever trains, evaluates, plans or exports asks these and never which architecture it is; what a network can do is said
by its fields (`writes`, `ranks`), not by its class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vltrain.batch import ImageFeatures, ImageInputs
from vltrain.models.adapters.routing import Routing
from vltrain.models.backbones.family import Network
from vltrain.models.flops import Flops
from vltrain.ops.attention import PACKED_SDPA, PACKED_TILED
from vltrain.ops.liger import Kernels
from vltrain.schema import IMAGE_TOKEN, Framing

Place = Callable[[nn.Module], None] | None


class LossOutput(NamedTuple):
    """loss_sum: fp32 scalar, summed over label positions; segment_losses: fp32 [S], the same by segment, detached.

    penalty: fp32 scalar, a term of the weights alone, where it was asked for.
    """

    loss_sum: Tensor
    segment_losses: Tensor
    penalty: Tensor | None = None


class InstructionSizes(NamedTuple):
    """What reads the prompt beside the LLM, a Q-Former: how many tokens it embeds, and positions it has."""

    vocab_size: int
    positions: int


@dataclass(frozen=True, kw_only=True)
class ImagePart:
    """What of a network reads images alone and may be frozen as a whole: its result is the same in every epoch then.

    weights  names of the parameters and buffers that compute it
    facts    what it depends on beside them, plain JSON
    flops_per_image  of the forward
    """

    weights: frozenset[str]
    facts: Mapping[str, Any]
    flops_per_image: float


def weights_below(network: nn.Module, *names: str) -> frozenset[str]:
    """Names of the parameters and buffers of the modules of these names."""
    inside = tuple(f"{name}." for name in names)
    every = (*network.named_parameters(), *network.named_buffers())
    return frozenset(name for name, _ in every if name.startswith(inside))


class VisionLanguageModel(nn.Module):
    """A network with a ViT (`vision`) and an LLM of transformers' (`llm`, whose `lm_head` computes losses).

    PARTS   what its parameters are counted, learn and are told by, in this order; see `part_of`. `vision` and `llm` are
            the networks' own weights, `peft` low-rank updates and prompts.
    BRIDGE  what stands between ViT and LLM, in words
    ranks   how candidate answers are computed: `rows`, one padded row each; `segments`, by the training's forward
    """

    PARTS: ClassVar[tuple[str, ...]]
    BRIDGE: ClassVar[str]
    ranks: ClassVar[Literal["rows", "segments"]] = "rows"

    vision: Any
    llm: Any
    framing: Framing
    """How an image becomes the square that the ViT reads."""
    routing: Routing | None = None
    """There if the LLM has routed adapters."""
    kernels: Kernels = "torch"
    """Of norms, rotary embedding and MLPs of the LLM."""

    @property
    def writes(self) -> Literal["decoder-only", "encoder-decoder", "whole model"]:
        """How answers are generated; `whole model`: by the family's own forward, which reads image tokens itself."""
        return "decoder-only"

    @property
    def visual_tokens(self) -> int:
        """Visual tokens per image."""
        raise NotImplementedError

    @property
    def image_token(self) -> int:
        """The id that stands in the places of visual tokens."""
        return IMAGE_TOKEN

    def nominal_images(self, count: int) -> ImageInputs | None:
        """What a batch holds of so many images of usual size, without numbers (whole numbers, which are sizes, are
        there); None where it holds squares of `image_size`."""
        return None

    @property
    def image_size(self) -> int:
        """Height and width of the images that the ViT reads, in pixels."""
        raise NotImplementedError

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks of ViT and LLM, whose linear layers are quantised where they are frozen."""
        raise NotImplementedError

    @property
    def llm_blocks(self) -> list[nn.Module]:
        """The LLM's transformer blocks, first to last, which ZeRO-3 gathers whole. [] leaves all to DeepSpeed."""
        return []

    @property
    def llm_block_classes(self) -> set[str]:
        """Names of their classes."""
        return {type(block).__name__ for block in self.llm_blocks}

    @property
    def trains_on_text(self) -> bool:
        """Whether a row without images reaches a trained parameter. None does where the bridge alone is trained, say:
        such a row's loss has no gradient."""
        return any(parameter.requires_grad for parameter in self.llm.parameters())

    @property
    def compilable_blocks(self) -> list[nn.Module]:
        """Those that `train.compile` compiles; [] where `Architecture.not_compilable` says why."""
        return []

    @property
    def template(self) -> str | None:
        """The name of the one template (`vltrain.data.text.conversation`) that it reads; None: any without an
        instruction."""
        return None

    @property
    def instruction(self) -> InstructionSizes | None:
        """Of what reads the prompt beside the LLM; None where nothing does."""
        return None

    @property
    def fp32_attention(self) -> str:
        """The LLM's attention where products are in fp32, which flash kernels do not know: transformers' name."""
        chosen = self.llm.config._attn_implementation
        return chosen if chosen in ("eager", PACKED_TILED) else PACKED_SDPA

    @classmethod
    def part_of(cls, name: str) -> str:
        """Which of `PARTS` the parameter of that name (of `named_parameters`) belongs to."""
        raise NotImplementedError

    def reference_size(self) -> int | None:
        """Parameters of what a paper calls 100% of tuning; None where there is no such figure."""
        return None

    def flops(self) -> Flops:
        """What a training step costs, given which parameters are trained now. To be asked before ZeRO-3 cuts them
        up."""
        raise NotImplementedError

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> fp32, mean and deviation taken out."""
        raise NotImplementedError

    def encode_images(self, pixels: Any) -> Tensor:
        """`Batch.pixels`, uint8 [N, 3, H, W], a stock model's or features -> states of each image [N, ...]. Without
        images no ViT pass happens, and of features none either."""
        raise NotImplementedError

    def image_part(self) -> ImagePart | None:
        """What `image_features` computes with; None: the network has no such part. To be asked before ZeRO-3 cuts
        parameters up."""
        return None

    def image_features(self, pixels: Any) -> ImageFeatures:
        """What the image part makes of one or more images, uint8 [N, 3, H, W] or a stock model's; `encode_images` goes
        on from it to the same states as from pixels."""
        raise NotImplementedError

    def look(self, states: Tensor, slots: Tensor, instruction_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The visual tokens of the K image runs of a batch.

        Args:
            states: [N, ...] from `encode_images`.
            slots: int64 [K], which image stands at each run; empty where an image is there for other ranks' sake.
            instruction_ids: int64 [K, I], what the run's prompt says, -1 where padded; [K, 0] where nothing reads it.

        Returns: ([M, V, d], int64 [K] which of them stands at each run), for `embed`.
        """
        return (states if len(slots) else states[:0]), slots

    def embed(self, input_ids: Tensor, visual: Tensor, image_slots: Tensor) -> Tensor:
        """The LLM's input [T, d] of int64 [T], placeholders below zero: token embeddings, with `visual` [M, V, d] in
        the places of its image runs, run `k` showing `image_slots[k]`."""
        raise NotImplementedError

    def decide_routing(self) -> None:
        """Lets routed adapters decide for both modalities, for `language_model` calls to come. Once after each change
        of weights. Without routed adapters it does nothing."""

    def shifted(self, targets: Tensor) -> Tensor:
        """An encoder-decoder's: what its decoder reads to predict `targets` int64 [B, L]."""
        raise NotImplementedError

    def decoder_states(self, input_ids: Tensor, encoded: Tensor, mask: Tensor, **arguments: Any) -> Tensor:
        """An encoder-decoder's: states [B, L, d] of its decoder, for its `lm_head`.

        Args:
            input_ids: int64 [B, L], what it reads, see `shifted`.
            encoded: [B, P, d], what the encoder made of the prompts; mask: [B, P], which of it is no padding.
            arguments: of the forward of transformers' decoder.
        """
        raise NotImplementedError

    def language_model(self, embeds: Tensor, modality: Tensor, **arguments: Any) -> Any:
        """A decoder-only LLM's blocks on a batch, for generation.

        Args:
            embeds: [B, L, d]. With `routing` they hold no modality token: it decides (`decide_routing`) but is not
                seen.
            modality: int64 [B], of each row: 0 text, 1 image.
            arguments: of the forward of transformers' decoder.
        """
        return self.llm.model(inputs_embeds=embeds, **arguments)


@dataclass(frozen=True, kw_only=True)
class PublishedSizes:
    """Sizes to plan with where a source's weights are not on this machine.

    name      of the option `--NAME-size`
    what      a published ..., in words
    example   a name of `networks`
    key       the setting that names the source
    assume    (section, name of `networks`) -> the section with these sizes and random weights
    """

    name: str
    what: str
    example: str
    key: str
    networks: Mapping[str, Network]
    assume: Callable[[Any, str], Any]


class Build(Protocol):
    """See `vltrain.models.build.build_model`."""

    def __call__(
        self,
        model: Any,
        *,
        dtype: torch.dtype,
        activation_checkpointing: bool,
        device: torch.device | str,
        runs_on: torch.device | str,
        place: Place,
    ) -> VisionLanguageModel: ...


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How the networks of one architecture come about. `model` is its section of a recipe everywhere
    (`vltrain.config.model`).

    build           the network with its weights, in training mode; on the meta device without
    check_sources   raises InputError for sources that are missing or do not fit, without reading weights
    weight_files    see `vltrain.models.build.weight_files`
    sizes           what can be planned with in the place of weights
    not_compilable  what of a section `train.compile` cannot do, in words; None: nothing
    trained_parts   the parts (`VisionLanguageModel.PARTS`) whose parameters a section trains; none: not said
    configs         transformers' configs of the networks that it is made of, by name; {}: it is not audited
    resized         (section, small configs under the names of `configs`) -> the section with these in the place of its
                    sources, random and in fp32, tuned as it is; None: it is not audited (`vltrain audit`)
    """

    build: Build
    check_sources: Callable[[Any], None]
    weight_files: Callable[[Any], dict[str, dict[str, Path]]]
    sizes: tuple[PublishedSizes, ...] = ()
    not_compilable: Callable[[Any], str | None] = lambda model: f"the architecture {model.architecture}"
    trained_parts: Callable[[Any], set[str]] = lambda model: set()
    configs: Callable[[Any], Mapping[str, PreTrainedConfig]] = lambda model: {}
    resized: Callable[[Any, Mapping[str, PreTrainedConfig]], Any] | None = None
