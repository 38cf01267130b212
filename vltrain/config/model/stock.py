"""What a recipe may say of any vision-language model of transformers (`AutoModelForImageTextToText`): `model.stock`,
read where `model.architecture` is `stock`.

Its own tower, projector and LLM, its own processor; adapters in front of the sublayers of tower and LLM
(`model.adapter`, as `mmt` has them), low-rank updates by peft, or its own weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from vltrain.config.model.base import IdleKey, ModelConfig, ProcessorPlaces, TokenizerPlaces
from vltrain.config.model.mmt import AdapterConfig
from vltrain.config.ranges import MOST_SIZE, check_ranges, number
from vltrain.errors import InputError, require

NETWORKS = ("vision", "llm")  # the parts with transformer blocks


@dataclass(kw_only=True)
class LowRankConfig:
    """Low-rank updates of linear layers in the blocks of a part, by peft; always trained."""

    kind: Literal["lora", "dora", "rslora", "pissa"] | None = None
    """lora: W x + (alpha / rank) B A x; rslora: scaled by alpha / sqrt(rank); dora: magnitude and direction of W apart;
    pissa: A and B begin as W's largest singular directions; null: no updates."""
    rank: int = number(8, 1, MOST_SIZE)
    """Rank r of the updates."""
    alpha: float = number(16.0, 0, 1e6, open_low=True)
    """The updates are scaled by alpha / rank."""
    dropout: float = number(0.0, 0, 1, open_high=True)
    """Dropout on the input of the updates."""
    targets: tuple[str, ...] = ("*",)
    """Which linear layers of every block, as shell patterns of their last names (`q_proj`, `*_proj`) or, with a dot, of
    their whole names within a block (`self_attn.*`). `*`: all."""


@dataclass(kw_only=True)
class NetworkConfig:
    """How a part with transformer blocks is tuned."""

    train: bool = False
    """Also tune its own weights."""
    peft: LowRankConfig = field(default_factory=LowRankConfig)


@dataclass(kw_only=True)
class ProjectorConfig:
    """How what stands between the tower's blocks and the LLM is tuned."""

    train: bool = False
    """Also tune its weights; with `tune: projector` or `full` it is tuned in any case."""


@dataclass(kw_only=True)
class StockSection:
    """A vision-language model of transformers, with its processor."""

    source: str | None = None
    """Folder or hub name of the model, with weights in safetensors; null: random weights of the sizes in `config`."""
    config: dict[str, Any] = field(default_factory=dict)
    """For random weights: what its config.json would say, `model_type` included."""
    processor: str | None = None
    """Where the processor is (folder or hub name), if not beside the weights; required with random weights."""
    processor_options: dict[str, Any] = field(default_factory=dict)
    """Settings of its image processor that differ from its own, e.g. `max_pixels`, `size`, `do_pan_and_scan`."""
    attention: Literal[
        "auto", "eager", "sdpa", "tiled", "varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4"
    ] = "auto"
    """Attention of the LLM's packed rows, as `model.llm.attention`."""
    tune: Literal["adapters", "projector", "full"] = "adapters"
    """adapters: adapters and low-rank updates; projector: the projector alone, without adapters and updates (a first
    stage, see `stages`); both with the parts whose `train` is true; full: everything that carries gradient."""
    vision: NetworkConfig = field(default_factory=NetworkConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    llm: NetworkConfig = field(default_factory=NetworkConfig)

    def __post_init__(self) -> None:
        for name in NETWORKS:
            peft = getattr(self, name).peft
            key = f"model.stock.{name}.peft"
            check_ranges(peft, key)
            distinct = 0 < len(peft.targets) == len(set(peft.targets))
            require(distinct, f"{key}.targets", list(peft.targets), "one or more patterns, each once")

    def require_source(self) -> None:
        """Raises InputError if it is not said where model and processor come from; asked only where the architecture is
        this one."""
        if (self.source is None) != bool(self.config):
            raise InputError(
                f"model.stock: found source {self.source!r} and config {self.config!r:.60}, expected either `source` "
                "(weights to load) or `config` (sizes of random ones)"
            )
        if self.source is None and self.processor is None:
            raise InputError(
                "model.stock.processor: found None, expected a processor (folder or hub name), since random weights "
                "come without one"
            )


@dataclass(kw_only=True)
class StockConfig(ModelConfig):
    """Any vision-language model of transformers."""

    FOLDER: ClassVar = "vltrain.models.stock"
    KERNELS: ClassVar = ("stock.attention", "adapter.impl")
    PATHS: ClassVar = ("stock.source", "stock.processor")
    FROZEN: ClassVar = ("stock.source", "stock.config")

    architecture: Literal["stock"] = "stock"  # pyright: ignore[reportIncompatibleVariableOverride] the union's tag
    stock: StockSection = field(default_factory=StockSection)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)

    def __post_init__(self) -> None:
        self.stock.require_source()
        super().__post_init__()

    def trains(self, network: str) -> bool:
        stock = self.stock
        return stock.tune == "full" or getattr(stock, network).train or network == stock.tune

    @property
    def places_adapters(self) -> bool:
        """Whether adapters and low-rank updates are put in at all."""
        return self.stock.tune != "projector"

    @property
    def tokenizers(self) -> TokenizerPlaces:
        source = self.stock.processor or self.stock.source
        assert source is not None, "StockSection asks for one of them"
        return TokenizerPlaces(key="model.stock.processor", source=source)

    @property
    def processor(self) -> ProcessorPlaces:
        stock = self.stock
        return ProcessorPlaces(
            key="model.stock.processor",
            source=self.tokenizers.source,
            model=stock.source,
            config=stock.config,
            options=stock.processor_options,
        )

    @property
    def bases(self) -> dict[str, str | None]:
        return {"model": self.stock.source}

    @classmethod
    def idle_keys(cls) -> Iterator[IdleKey]:
        of_adapters = [f"model.adapter.{entry.name}" for entry in fields(AdapterConfig)]
        of_updates = [f"model.stock.{part}.peft.{entry.name}" for part in NETWORKS for entry in fields(LowRankConfig)]
        for key in (*of_updates, *of_adapters):
            yield (
                key,
                lambda model: model.stock.tune == "projector",
                "model.stock.tune = projector puts neither adapters nor low-rank updates in",
            )
        for key in of_adapters:
            if key not in ("model.adapter.vision", "model.adapter.llm"):
                yield (
                    key,
                    lambda model: model.adapter.vision == model.adapter.llm == "none",
                    "model.adapter.vision and model.adapter.llm are none",
                )
        yield (
            "model.adapter.vision_kind",
            lambda model: model.adapter.vision == "none",
            "model.adapter.vision is none",
        )
        for part in (*NETWORKS, "projector"):
            yield (
                f"model.stock.{part}.train",
                lambda model: model.stock.tune == "full",
                "model.stock.tune = full tunes everything",
            )
        for part in NETWORKS:
            for name in ("rank", "alpha", "dropout", "targets"):
                key = f"model.stock.{part}.peft"
                yield f"{key}.{name}", _has_no_updates(part), f"{key}.kind is null"


def _has_no_updates(part: str) -> Callable[[Any], bool]:
    return lambda model: getattr(model.stock, part).peft.kind is None
