"""What a recipe may say of an InstructBLIP: `model.instructblip`, read where `model.architecture` is `instructblip`.

Paper: "Parameter-Efficient Fine-tuning of InstructBLIP for Visual Reasoning Tasks": LoRA and AdaLoRA on the Q-Former,
the LLM, or both.
Query tokens, the norm behind the ViT and the projection into the LLM are always tuned, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from vltrain.config.model.adalora import AdaLoraSchedule
from vltrain.config.model.base import IdleKey, ModelConfig, TokenizerPlaces
from vltrain.config.ranges import MOST_SIZE, check_ranges, number
from vltrain.errors import InputError, require

Mode = Literal["frozen", "full", "lora", "adalora"]
QFormerTarget = Literal["self", "cross", "ffn"]
LanguageTarget = Literal["attn", "ffn"]
QFORMER_SUBFOLDER = "qformer_tokenizer"  # of a folder in transformers' layout


@dataclass(kw_only=True)
class QFormerTuning:
    """How the Q-Former is tuned."""

    mode: Mode = "lora"
    """frozen; full: all its own weights; lora, adalora: low-rank updates of the linear layers in `targets`, by peft."""
    targets: tuple[QFormerTarget, ...] = ("self", "cross", "ffn")
    """self: query and value of self-attention; cross: query, key, value and output of cross-attention; ffn: both
    matrices of both FFNs, that of the queries and that of the text."""
    rank: int = number(8, 1, MOST_SIZE)
    """lora: rank r (the paper: 1, 2, 4, 8). adalora has `model.instructblip.adalora.init_rank` and `target_rank`."""
    alpha: float = number(8.0, 0, 1e6, open_low=True)
    """Updates are scaled by alpha / rank."""
    dropout: float = number(0.0, 0, 1, open_high=True)
    """Dropout on the input of the updates."""

    def __post_init__(self) -> None:
        _check_low_rank("model.instructblip.qformer", self)


@dataclass(kw_only=True)
class LanguageTuning:
    """How the LLM is tuned."""

    mode: Mode = "frozen"
    """As `model.instructblip.qformer.mode`."""
    targets: tuple[LanguageTarget, ...] = ("attn", "ffn")
    """attn: query and value (of T5: of self- and cross-attention); ffn: the three matrices of the FFN."""
    rank: int = number(8, 1, MOST_SIZE)
    """lora: rank r."""
    alpha: float = number(8.0, 0, 1e6, open_low=True)
    """Updates are scaled by alpha / rank."""
    dropout: float = number(0.0, 0, 1, open_high=True)
    """Dropout on the input of the updates."""

    def __post_init__(self) -> None:
        _check_low_rank("model.instructblip.llm", self)


def _check_low_rank(key: str, tuning: QFormerTuning | LanguageTuning) -> None:
    check_ranges(tuning, key)
    distinct = 0 < len(tuning.targets) == len(set(tuning.targets))
    require(distinct, f"{key}.targets", list(tuning.targets), "one or more sublayers, each once")


@dataclass(kw_only=True)
class InstructBlipConfig:
    """ViT, Q-Former and LLM (Flan-T5 or a LLaMA such as Vicuna) in transformers' layout."""

    source: str | None = None
    """Folder or hub name of an InstructBLIP; null: random weights of the sizes in `config`."""
    config: dict[str, Any] = field(default_factory=dict)
    """For random weights: transformers' InstructBlipConfig, i.e. vision_config (`initializer_range` 0.02 unless given),
    qformer_config, text_config (with model_type t5 or llama) and num_query_tokens."""
    preprocessing: Literal["checkpoint", "square"] = "checkpoint"
    """How images become pixels. checkpoint: as the preprocessor_config.json beside the weights says (resize, crop,
    filter, mean, deviation), and as with `square` where there is none; square: resized straight to the square, bicubic,
    CLIP's mean and deviation."""
    tokenizer: str | None = None
    """Where the LLM's tokenizer is, if not beside the weights; required with random weights."""
    qformer_tokenizer: str | None = None
    """Where the Q-Former's tokenizer is; null: `qformer_tokenizer` beside the weights. Required with random weights."""
    qformer_tokens: int = number(128, 3, MOST_SIZE)
    """Tokens of the prompt that the Q-Former reads, at most (the paper's code: 128; it has positions for 512). What is
    beyond is cut off for the Q-Former alone, and counted when packing; the LLM reads the whole."""
    adapters: str | None = None
    """A folder of peft's, LoRA or AdaLoRA, as `vltrain export` or peft itself writes it, that the tuned parameters
    start from; layers, ranks and scaling must be the recipe's. null: untrained updates."""
    attention: Literal[
        "auto", "eager", "sdpa", "tiled", "varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4"
    ] = "auto"
    """Attention of a LLaMA's packed rows, as `model.llm.attention`. T5's is transformers' own."""
    kernels: Literal["auto", "torch", "liger"] = "auto"
    """What computes a LLaMA's norms, rotary embedding and SwiGLU, as `model.llm.kernels`. T5's are transformers'
    own."""
    dropout: float | None = number(None, 0, 1, open_high=True)
    """Every dropout rate of ViT, Q-Former and LLM while training; null: as their config says (the released ones: 0.1 in
    Q-Former and T5)."""
    vision: Literal["frozen", "full"] = "frozen"
    """full: also tune the ViT's own weights (the paper does not)."""
    qformer: QFormerTuning = field(default_factory=QFormerTuning)
    llm: LanguageTuning = field(default_factory=LanguageTuning)
    adalora: AdaLoraSchedule = field(default_factory=AdaLoraSchedule)

    def __post_init__(self) -> None:
        check_ranges(self, "model.instructblip")

    def require_source(self) -> None:
        """Raises InputError if it is not said where the model comes from; asked only where the architecture is this
        one."""
        if (self.source is None) != bool(self.config):
            raise InputError(
                f"model.instructblip: found source {self.source!r} and config {self.config!r:.60}, expected "
                "either `source` (weights to load) or "
                "`config` (sizes of random ones)"
            )
        for name in ("tokenizer", "qformer_tokenizer"):
            if self.source is None and getattr(self, name) is None:
                raise InputError(
                    f"model.instructblip.{name}: found None, expected a tokenizer (folder, file or hub name), since "
                    "random weights come without one"
                )


@dataclass(kw_only=True)
class BlipModelConfig(ModelConfig):
    """An InstructBLIP."""

    FOLDER: ClassVar = "vltrain.models.instructblip"
    KERNELS: ClassVar = ("instructblip.attention", "instructblip.kernels")
    PATHS: ClassVar = tuple(f"instructblip.{name}" for name in ("source", "tokenizer", "qformer_tokenizer", "adapters"))
    FROZEN: ClassVar = ("instructblip.source", "instructblip.config")

    architecture: Literal["instructblip"] = "instructblip"  # pyright: ignore[reportIncompatibleVariableOverride] the tag
    instructblip: InstructBlipConfig = field(default_factory=InstructBlipConfig)

    def __post_init__(self) -> None:
        self.instructblip.require_source()
        super().__post_init__()

    def trains(self, network: str) -> bool:
        if network == "projector":
            return True
        return (self.instructblip.vision if network == "vision" else self.instructblip.llm.mode) == "full"

    @property
    def tokenizers(self) -> TokenizerPlaces:
        blip = self.instructblip
        source, read_with = blip.tokenizer or blip.source, blip.qformer_tokenizer or blip.source
        assert source is not None and read_with is not None, "InstructBlipConfig asks for them"
        return TokenizerPlaces(
            key="model.instructblip.tokenizer",
            source=source,
            instruction_key="model.instructblip.qformer_tokenizer",
            instruction=read_with,
            instruction_subfolder="" if blip.qformer_tokenizer else QFORMER_SUBFOLDER,
            instruction_tokens=blip.qformer_tokens,
        )

    @property
    def bases(self) -> dict[str, str | None]:
        return {"InstructBLIP": self.instructblip.source}

    @property
    def adalora(self) -> AdaLoraSchedule | None:
        blip = self.instructblip
        return blip.adalora if "adalora" in (blip.qformer.mode, blip.llm.mode) else None

    @property
    def start(self) -> tuple[str, str] | None:
        named = self.instructblip.adapters
        return None if named is None else ("model.instructblip.adapters", named)

    def started_from(self, peft_folder: str) -> BlipModelConfig:
        return replace(self, instructblip=replace(self.instructblip, adapters=peft_folder))

    @classmethod
    def idle_keys(cls) -> Iterator[IdleKey]:
        def is_not(network: str, modes: tuple[str, ...]) -> Callable[[Any], bool]:
            return lambda model: getattr(model.instructblip, network).mode not in modes

        low_rank = ("lora", "adalora")
        for network in ("qformer", "llm"):
            for name, modes in (("targets", low_rank), ("rank", ("lora",)), ("alpha", low_rank), ("dropout", low_rank)):
                key = f"model.instructblip.{network}"
                yield f"{key}.{name}", is_not(network, modes), f"{key}.mode is not {' or '.join(modes)}"
        for entry in fields(AdaLoraSchedule):
            key = f"model.instructblip.adalora.{entry.name}"
            yield key, lambda model: model.adalora is None, "neither network's mode is adalora"
