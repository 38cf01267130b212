"""What every architecture's section of a recipe has in common: `model.architecture` says whose keys the others are.

A section is a dataclass, a subclass of `ModelConfig`, and one line of `vltrain.config.model.architectures`: a tagged
union, so that keys of one architecture have no place in another. What follows from the settings alone is asked of the
section; what needs a network, of the `Architecture` in its `FOLDER` (`vltrain.models.architectures`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from vltrain.config.model.adalora import AdaLoraSchedule
from vltrain.config.ranges import MOST_SEED, check_ranges, number
from vltrain.errors import InputError

IdleKey: TypeAlias = tuple[str, Callable[[Any], bool], str]
"""(dotted key, whether it changes nothing beside the section's other settings, why then)."""


@dataclass(frozen=True, kw_only=True)
class TokenizerPlaces:
    """Where the tokenizers are, and the keys that name them. `instruction`: of what reads the prompt beside the LLM, a
    Q-Former, `instruction_tokens` of it at most; None: nothing does."""

    key: str
    source: str
    instruction_key: str = ""
    instruction: str | None = None
    instruction_subfolder: str = ""
    instruction_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class ProcessorPlaces:
    """Where a stock model's processor is, which reads samples and images in the place of a template and of squares.

    key      the key that names it
    model    where the model is, whose config is asked; None: `config` is that
    options  of the image processor, other than its own
    """

    key: str
    source: str
    model: str | None
    config: dict[str, Any]
    options: dict[str, Any]


@dataclass(kw_only=True)
class ModelConfig:
    """The model."""

    FOLDER: ClassVar[str]
    """The package with its module `architecture`, see `vltrain.models.architectures`."""
    KERNELS: ClassVar[tuple[str, ...]] = ()
    """Keys below `model` that choose what computes: no part of a run's identity."""
    PATHS: ClassVar[tuple[str, ...]] = ()
    """Keys below `model` that name files: they may move where the digests of what is there are known."""
    FROZEN: ClassVar[tuple[str, ...]] = ()
    """Keys below `model` that frozen weights follow from; of random ones their sizes (and `seed`)."""

    architecture: str = "mmt"
    """mmt: ViT, adapters, neck and LLaMA of Multimodal Model Tuning, from the sections vision, llm, adapter and neck;
    instructblip: ViT, Q-Former and LLM, from the section instructblip; stock: any vision-language model of
    transformers, from the sections stock and adapter."""
    bits: Literal[4, 8, 16, 32] | None = None
    """Bits of the frozen weights of ViT and LLM; also `--bits`. 4: NF4 with double quantisation, 8: LLM.int8 with
    threshold 6, both of the blocks' linear layers by bitsandbytes (extra `quant`), the rest as with null; 16: bf16; 32:
    fp32; null: as `train.precision` says. Where one of both networks is tuned itself, it is fp32 and the bits are the
    other's."""
    seed: int = number(0, 0, MOST_SEED)
    """Seed of every weight that is not loaded."""

    def __post_init__(self) -> None:
        check_ranges(self, "model")
        if self.bits in (4, 8) and self.trains_all:
            raise InputError(
                f"model.bits: found {self.bits}, but only frozen weights can be quantised, and here ViT and LLM "
                "are both tuned themselves; "
                "leave the bits out, or tune adapters"
            )

    def trains(self, network: str) -> bool:
        """Whether the own weights of `vision`, `llm` or of what stands between them, `projector`, are tuned."""
        raise NotImplementedError

    @property
    def trains_all(self) -> bool:
        """Whether the own weights of both networks are tuned."""
        return self.trains("vision") and self.trains("llm")

    @property
    def tokenizers(self) -> TokenizerPlaces:
        """Where the tokenizers are."""
        raise NotImplementedError

    @property
    def processor(self) -> ProcessorPlaces | None:
        """What reads samples and images; None: `data.template`, and squares of the ViT's size."""
        return None

    @property
    def bases(self) -> dict[str, str | None]:
        """Where the weights below the tuned ones come from, by the network's name in words; None: random ones."""
        raise NotImplementedError

    @property
    def adalora(self) -> AdaLoraSchedule | None:
        """How ranks are pruned in the course of a run; None where nothing is tuned by AdaLoRA."""
        return None

    @property
    def start(self) -> tuple[str, str] | None:
        """(key, folder) of trained weights that the section itself names to start from; None: it names none."""
        return None

    def started_from(self, peft_folder: str) -> ModelConfig | None:
        """The same section with a folder of peft's to start from; None where it can't start from one."""
        return None

    def identity(self) -> dict[str, Any]:
        """What says which network a run's weights belong to, plain values."""
        identity = asdict(self)
        for key in self.KERNELS:
            *sections, name = key.split(".")
            place = identity
            for section in sections:
                place = place[section]
            del place[name]
        return identity

    @classmethod
    def idle_keys(cls) -> Iterator[IdleKey]:
        """Settings of the section that change nothing beside others of it, in the order in which they are told."""
        yield from ()
