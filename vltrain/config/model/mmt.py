"""What a recipe may say of Multimodal Model Tuning: keys directly below `model`, where `model.architecture` is `mmt`.

ViT, neck and LLM; adapters behind their norms; peft's layers in ViT and LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from vltrain.config.model.base import IdleKey, ModelConfig, TokenizerPlaces
from vltrain.config.ranges import MOST_SIZE, check_ranges, named, number
from vltrain.errors import require

LOW_RANK = ("lora", "dora", "rslora", "pissa")
"""Kinds of `PeftConfig` that are low-rank updates of linear layers."""
READS_WEIGHTS = ("dora", "pissa")
"""Those that read the weights of the layers that they update."""
Placement = Literal["none", "attention", "ffn", "both"]


@dataclass(kw_only=True)
class AdapterConfig:
    """The adapter inserted behind the norms of blocks, in the ViT and in the LLM."""

    kind: str = named("vltrain.models.adapters.ADAPTERS", "bottleneck")
    """Which adapter."""
    vision_kind: str | None = named("vltrain.models.adapters.ADAPTERS", None)
    """The ViT's kind, if it differs from the LLM's; null: `kind`. All other settings apply to both."""
    dim: int = number(16, 1, MOST_SIZE)
    """Width h of the bottleneck (Table 2: 4, 8, 16, 32)."""
    groups: int = number(2, 1, MOST_SIZE)
    """Groups k of the up projection, Eq. 2 (Table 2: 2, 4)."""
    down_groups: int = number(1, 1, MOST_SIZE)
    """Groups of the down projection; 1 is dense, as in Eq. 2."""
    bias: bool = True
    """Whether it has biases; without them a linear adapter is a plain LoRA, which every engine loads
    (`vltrain export --format lora`)."""
    dropout: float = number(0.0, 0, 1, open_high=True)
    """Dropout on the bottleneck's activations; 0 keeps the adapter linear and mergeable."""
    rank: int = number(4, 1, MOST_SIZE)
    """Rank of the factors of LoHa kinds."""
    scale: float = number(1.0, 0, 1e6, open_low=True)
    """Fixed factor s on what the adapter adds, of kinds other than `bottleneck`."""
    residual: bool = True
    """repadapter: add the input (a residual); false: f(Z) = s psi_u(psi_d(Z)) alone, as the visual adapters that
    LaVIN's code calls `normal`."""
    temperature: float = number(10.0, 1e-3, 1e6)
    """Temperature t of the routing weights of routed kinds (LaVIN: 10 for 7B, 5 for 13B)."""
    vision: Placement = "attention"
    """Where adapters are inserted in each ViT block: before which sublayers."""
    llm: Placement = "attention"
    """Where adapters are inserted in each LLM block: before which sublayers."""
    impl: Literal["auto", "torch", "triton"] = "auto"
    """What computes it. triton: one fused kernel, together with the RMSNorm before it where that is frozen, whole and
    read by nothing else; torch: plain operations; auto: triton on CUDA where the kernel can do it, else torch."""

    def __post_init__(self) -> None:
        check_ranges(self, "model.adapter")
        for name in ("groups", "down_groups"):
            groups = getattr(self, name)
            require(
                self.dim % groups == 0, f"model.adapter.{name}", groups, f"a divisor of model.adapter.dim = {self.dim}"
            )


@dataclass(kw_only=True)
class TowerPeftConfig:
    """Low-rank updates by peft in the ViT's blocks, beside the adapters or instead of them; always trained."""

    kind: Literal["lora", "dora", "rslora", "pissa"] | None = None
    """As `model.llm.peft.kind`, which has prompts besides; null: no updates."""
    rank: int = number(8, 1, MOST_SIZE)
    """Rank r of the updates."""
    alpha: float = number(16.0, 0, 1e6, open_low=True)
    """The updates are scaled by alpha / rank (rslora: alpha / sqrt(rank))."""
    dropout: float = number(0.0, 0, 1, open_high=True)
    """Dropout on the input of the updates."""
    targets: tuple[str, ...] = named("vltrain.models.peft.lora.TOWER_TARGETS", ("q_proj", "v_proj"))
    """Which linear layers of every block that is read; all families have the default's."""

    def __post_init__(self) -> None:
        check_ranges(self, "model.vision.peft")
        _require_distinct("model.vision.peft.targets", self.targets)


@dataclass(kw_only=True)
class VisionConfig:
    """The image encoder: a ViT (CLIP, SigLIP, SigLIP 2, DINOv2, DINOv3), some of whose states are the visual tokens."""

    source: str | None = None
    """Folder, hub name, `package://MODULE/PATH`, `asset://NAME`, or a state dict (.pt, .pth, .ckpt, .bin, .safetensors)
    with OpenAI-CLIP's names; null: random weights of the size in `config`."""
    kind: Literal["clip", "diht", "alip"] | None = None
    """Whose ViT a state dict holds, which decides its activation (diht: exact GELU; clip, alip:
    x sigmoid(1.702 x)); Hugging Face folders name it themselves."""
    config: dict[str, Any] = field(default_factory=dict)
    """For random weights: keys of transformers' config, CLIPVisionConfig or that of `model_type`."""
    preprocessing: Literal["checkpoint", "square"] = "checkpoint"
    """How images become pixels. checkpoint: as the preprocessor_config.json beside the weights says (resize, crop,
    filter, mean, deviation), and as with `square` where there is none; square: resized straight to the square, bicubic,
    mean and deviation of the tower's family."""
    image_size: int | None = number(None, 1, MOST_SIZE)
    """Edge of the square that is read, in pixels, of towers whose positions fit any (DINOv2, DINOv3); null: what the
    checkpoint's preprocessing makes, or its config says."""
    tokens: Literal["cls", "patches", "pooler"] = "cls"
    """What becomes visual tokens. cls: [cls] states after every `tap_every`-th block (the paper's); patches: the states
    of all patches after the last of `blocks` (LLaVA's); pooler: one token, the ViT's own pooled output."""
    tap_every: int = number(4, 1, MOST_SIZE)
    """cls: a state is read after each `tap_every`-th block: 4 of 24 blocks give 6 visual tokens."""
    blocks: int | None = number(None, 1, MOST_SIZE)
    """patches: after how many blocks; null: after all but the last."""
    pool: int = number(1, 1, MOST_SIZE)
    """patches: the mean of each square of `pool` x `pool` patches is one visual token."""
    peft: TowerPeftConfig = field(default_factory=TowerPeftConfig)
    train: bool = False
    """Also tune the ViT's own weights."""

    def __post_init__(self) -> None:
        check_ranges(self, "model.vision")
        require(
            (self.source is None) == bool(self.config),
            "model.vision",
            {"source": self.source, "config": self.config},
            "either `source` (weights to load) or `config` (sizes of a random ViT)",
        )
        require(
            self.kind is None or self.source is not None,
            "model.vision.kind",
            self.kind,
            "null with random weights",
        )


@dataclass(kw_only=True)
class PeftConfig:
    """What peft adds to the LLM's blocks, beside the adapters or instead of them; always trained."""

    kind: Literal["lora", "dora", "rslora", "pissa", "adaption_prompt"] | None = None
    """lora: low-rank updates of linear layers; dora: LoRA that learns the rows' lengths apart; rslora: LoRA scaled by
    alpha / sqrt(rank); pissa: LoRA whose factors begin as the weights' largest singular values; adaption_prompt:
    LLaMA-Adapter's gated prompts; null: none."""
    rank: int = number(8, 1, MOST_SIZE)
    """lora and its kin: rank r of the updates."""
    alpha: float = number(16.0, 0, 1e6, open_low=True)
    """lora and its kin: the updates are scaled by alpha / rank (rslora: alpha / sqrt(rank))."""
    dropout: float = number(0.0, 0, 1, open_high=True)
    """lora and its kin: dropout on the input of the updates."""
    targets: tuple[str, ...] = named("vltrain.models.peft.lora.TARGETS", ("q_proj", "v_proj"))
    """lora and its kin: which linear layers of every block."""
    adapter_len: int = number(10, 1, MOST_SIZE)
    """adaption_prompt: learned prompts in each adapted block."""
    adapter_layers: int | None = number(None, 1, MOST_SIZE)
    """adaption_prompt: how many of the topmost blocks are adapted; null: all."""

    def __post_init__(self) -> None:
        check_ranges(self, "model.llm.peft")
        _require_distinct("model.llm.peft.targets", self.targets)


def _require_distinct(key: str, targets: tuple[str, ...]) -> None:
    require(0 < len(targets) == len(set(targets)), key, list(targets), "one or more layers, each once")


@dataclass(kw_only=True)
class LLMConfig:
    """The language model: a LLaMA, Qwen2, Qwen3, SmolLM3, Phi-3, OLMo 2 or Gemma."""

    source: str | None = None
    """Folder (Hugging Face's or Meta's layout), hub name, `package://MODULE/PATH` (a .gguf file too) or `asset://NAME`;
    null: random weights of the size in `config`."""
    config: dict[str, Any] = field(default_factory=dict)
    """For random weights: keys of transformers' config, LlamaConfig or that of `model_type`."""
    tokenizer: str | None = None
    """Where the tokenizer is, if not beside the weights; required with random weights."""
    attention: Literal[
        "auto", "eager", "sdpa", "tiled", "varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4"
    ] = "auto"
    """Attention of packed rows; auto: where products are in bf16 on CUDA a flash-attn that is installed and fits the
    GPU, else torch's own variable-length kernel (torch 2.10), else SDPA over segments as a padded batch; on a CPU with
    one or two threads `tiled`, vltrain's own, in whose favour SDPA is left where that was measured to be faster."""
    kernels: Literal["auto", "torch", "liger"] = "auto"
    """What computes norms, rotary embedding and SwiGLU; auto: Liger's kernels on CUDA where they are installed (extra
    `gpu`), else torch."""
    peft: PeftConfig = field(default_factory=PeftConfig)
    train: bool = False
    """Also tune the LLM's own weights."""

    def __post_init__(self) -> None:
        require(
            (self.source is None) == bool(self.config),
            "model.llm",
            {"source": self.source, "config": self.config},
            "either `source` (weights to load) or `config` (sizes of a random LLM)",
        )
        named = self.source is not None or self.tokenizer is not None
        require(
            named,
            "model.llm.tokenizer",
            self.tokenizer,
            "a tokenizer (folder, file or hub name), since random weights come without one",
        )


@dataclass(kw_only=True)
class NeckConfig:
    """The visual neck, Eq. 3: visual features to the LLM's width."""

    kind: Literal["bottleneck", "linear", "mlp"] = "bottleneck"
    """`bottleneck`: Eq. 3; `linear`: one matrix, as the first LLaVA's; `mlp`: LLaVA-1.5's, two layers of the
    LLM's width with GELU."""
    dim: int = number(128, 1, MOST_SIZE)
    """Hidden width d_v of Eq. 3; used by `bottleneck` alone."""

    def __post_init__(self) -> None:
        check_ranges(self, "model.neck")


@dataclass(kw_only=True)
class MmtConfig(ModelConfig):
    """ViT, adapters, neck and LLM."""

    FOLDER: ClassVar = "vltrain.models.mmt"
    KERNELS: ClassVar = ("llm.attention", "llm.kernels", "adapter.impl")
    PATHS: ClassVar = ("vision.source", "llm.source", "llm.tokenizer")
    FROZEN: ClassVar = ("vision.source", "vision.config", "vision.kind", "llm.source", "llm.config")

    architecture: Literal["mmt"] = "mmt"  # pyright: ignore[reportIncompatibleVariableOverride] the union's tag
    vision: VisionConfig = field(default_factory=lambda: VisionConfig(source="asset://tiny_vit", tap_every=1))
    llm: LLMConfig = field(default_factory=lambda: LLMConfig(source="asset://tiny_llama"))
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    neck: NeckConfig = field(default_factory=NeckConfig)
    tune: Literal["adapters", "neck", "full"] = "adapters"
    """adapters: adapters, peft's layers, neck and modality embedding; neck: the latter two alone, without adapters and
    peft's layers (a first stage, see `stages`); both with what `vision.train` and `llm.train` add; full: everything
    that carries gradient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for part, peft in (("vision", self.vision.peft), ("llm", self.llm.peft)):
            packed = self.bits in (4, 8) and not self.trains(part)
            require(
                not packed or peft.kind not in READS_WEIGHTS,
                f"model.{part}.peft.kind",
                peft.kind,
                f"lora or rslora: it reads the weights that model.bits {self.bits} packs",
            )

    def trains(self, network: str) -> bool:
        return network == "projector" or self.tune == "full" or getattr(self, network).train

    @property
    def tokenizers(self) -> TokenizerPlaces:
        source = self.llm.tokenizer or self.llm.source
        assert source is not None, "LLMConfig asks for one of them"
        return TokenizerPlaces(key="model.llm.tokenizer", source=source)

    @property
    def bases(self) -> dict[str, str | None]:
        return {"ViT": self.vision.source, "LLM": self.llm.source}

    def identity(self) -> dict[str, Any]:
        identity = super().identity()
        del identity["architecture"]  # the first runs knew one architecture
        # and one kind of visual tokens, of one size
        for name, default in (("tokens", "cls"), ("blocks", None), ("pool", 1), ("image_size", None)):
            if identity["vision"][name] == default:
                del identity["vision"][name]
        if self.vision.peft == TowerPeftConfig():  # nor updates in the ViT
            del identity["vision"]["peft"]
        return identity

    @classmethod
    def idle_keys(cls) -> Iterator[IdleKey]:
        def peft_is_none_of(part: str, *kinds: str) -> Callable[[Any], bool]:
            return lambda model: getattr(model, part).peft.kind not in kinds

        of_adapters = [f"model.adapter.{entry.name}" for entry in fields(AdapterConfig)]
        sections = (("llm", PeftConfig), ("vision", TowerPeftConfig))
        of_peft = [f"model.{part}.peft.{entry.name}" for part, section in sections for entry in fields(section)]
        for key in (*of_peft, *of_adapters):
            yield (
                key,
                lambda model: model.tune == "neck",
                "model.tune = neck puts neither adapters nor peft's layers in",
            )
        for name in ("blocks", "pool"):
            yield (
                f"model.vision.{name}",
                lambda model: model.vision.tokens != "patches",
                "model.vision.tokens is not patches",
            )
        yield "model.vision.tap_every", lambda model: model.vision.tokens != "cls", "model.vision.tokens is not cls"
        yield (
            "model.neck.dim",
            lambda model: model.neck.kind != "bottleneck",
            "model.neck.kind = linear or mlp has no hidden width",
        )
        nowhere = "model.adapter.vision and model.adapter.llm are none"
        for key in of_adapters:
            if key not in ("model.adapter.vision", "model.adapter.llm"):
                yield key, lambda model: model.adapter.vision == model.adapter.llm == "none", nowhere
        in_no_vision = "model.adapter.vision is none"
        yield "model.adapter.vision_kind", lambda model: model.adapter.vision == "none", in_no_vision
        of_low_rank = ("rank", "alpha", "dropout", "targets")
        for part, kinds, names in (
            ("llm", LOW_RANK, of_low_rank),
            ("llm", ("adaption_prompt",), ("adapter_len", "adapter_layers")),
            ("vision", LOW_RANK, of_low_rank),
        ):
            for name in names:
                told = f"model.{part}.peft.kind is not {' or '.join(kinds)}"
                yield f"model.{part}.peft.{name}", peft_is_none_of(part, *kinds), told
