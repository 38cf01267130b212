"""What a recipe may say: every key is declared, documented and checked here.

A recipe is a YAML file of these keys; the command line overrides it (`--model.adapter.dim 8`). Keys that are not
declared fail with the nearest match. Each value has one owner: DeepSpeed's JSON holds memory and communication knobs
only and says "auto" where this file decides (see `vltrain.train.zero.engine`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vltrain.config.model.base import ModelConfig
from vltrain.config.model.mmt import MmtConfig
from vltrain.config.ranges import (
    MOST_PIXELS,
    MOST_SEED,
    MOST_SIZE,
    MOST_STEPS,
    MOST_TOKENS,
    MOST_WORKERS,
    check_ranges,
    named,
    number,
)
from vltrain.errors import InputError
from vltrain.errors import require as _require

OWN = "samples"  # the source that prepares nothing
EASYVQA_ROOT = "data/easyvqa"


def _require_here(key: str, folder: str | None) -> None:
    """Raises InputError for an address where a folder is written."""
    _require(folder is None or "://" not in folder, key, folder, "a folder of this machine, which is written to")


@dataclass(kw_only=True)
class DataConfig:
    """Raw data, its prepared samples and its packed shards."""

    source: str | None = named("data_prep.sources.SOURCES", None, beside=(OWN,))
    """Which reader of `data_prep.sources` prepares the raw data; `samples`: none, they are samples in JSONL already and
    are read where they are; null: easyvqa for its own root, and for any other root the samples that are prepared there,
    whatever they were made from."""
    input: str | None = None
    """Where the raw data is; null where the source finds it by itself (easyvqa: the installed package). Of `samples`: a
    folder of SPLIT.jsonl, or the file of `train_split`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of that reader, e.g. `prompt_format: QCM-ALE` of scienceqa. Of `samples`: the files of further splits,
    `val: FILE`."""
    root: str = EASYVQA_ROOT
    """Where prepared samples (`samples/SPLIT.jsonl`) and packs (`packed/SPLIT-FINGERPRINT/`) are kept; made if missing.
    The default is kept for easyvqa; what is there is used only if it was made from what the recipe says."""
    train_split: str = "train"
    eval_split: str = "val"
    """The split that is evaluated while training."""
    test_split: str = "test"
    """The split that `vltrain evaluate` answers unless told otherwise."""
    train_packs: str | None = None
    """A folder of packed shards to train on, instead of the one under `root`: a path, or an address that fsspec knows
    (`s3://`, `gs://`, `https://`, ...)."""
    cache: str | None = None
    """Where blocks of packs at an address are kept; null: in the user's cache (`$XDG_CACHE_HOME/vltrain/packs`)."""
    cache_gib: float = number(32.0, 1e-4, 1e6)
    """The most that they may take there, in GiB; ranks and runs of a machine share it."""
    mixture: dict[str, Any] = field(default_factory=dict)
    """Several sets that are trained on together (launch/MIXTURES.md): by name, each with its `weight`, `source`,
    `input`, `options`, `root`, `train_packs`, splits and `scorer`."""
    mixture_by: Literal["tokens", "samples", "passes"] = "passes"
    """What a set's weight is of: its share of the tokens or of the samples that are trained on, or how often an epoch
    passes over it."""
    when_a_set_ends: Literal["repeat", "stop"] = "repeat"
    """repeat: a set that ends begins its next pass, in another order, while the others go on; stop: the run ends with
    the first set that has had `train.epochs` passes."""
    template: str = named("vltrain.data.text.conversation.TEMPLATES", "mmt")
    """How turns become tokens; of a stock model `processor`: as its own does."""
    pack_length: int = number(1024, 8, MOST_TOKENS)
    """Tokens a pack may hold: what a micro-step of one rank trains on."""
    max_images: int | None = number(None, 1, MOST_SIZE)
    """Images a pack may hold, to bound the ViT's memory; null: no bound."""
    over_long: Literal["error", "drop"] = "error"
    """What to do with samples that do not fit into a pack. `error`: nothing is packed, and they are named; `drop`: they
    are left out and listed in the packs' `over_long.jsonl`. None is ever cut."""
    fraction: float = number(1.0, 0, 1, open_low=True)
    """Share of the training split's samples that is packed and trained on. A sample is drawn by a hash of its id and
    `data.fraction_seed`, whatever the others are: the samples of 0.01 are among those of 0.1."""
    fraction_seed: int = number(0, 0, MOST_SEED)
    """Which samples `data.fraction` draws."""
    workers: int = number(1, 0, MOST_WORKERS)
    """Processes per rank that decode images; 0: in the training process."""
    max_image_pixels: int = number(50_000_000, 1, MOST_PIXELS)
    """Larger images are refused (decompression bombs)."""

    def __post_init__(self) -> None:
        check_ranges(self, "data")
        _require_here("data.root", self.root)
        _require_here("data.cache", self.cache)

    @property
    def is_remote(self) -> bool:
        """Whether the packs to train on, or some of a mixture's, are at an address."""
        named = [self.train_packs, *(one.get("train_packs") for one in self.mixture.values())]
        return any(one is not None and "://" in one for one in named)

    @property
    def is_easyvqa(self) -> bool:
        """Whether it is the installed easy-VQA, by its name or by its root."""
        return self.input is None and (self.source == "easyvqa" or (self.source is None and self.root == EASYVQA_ROOT))

    @property
    def reader(self) -> str | None:
        """Which reader prepares the samples; None where they must be there."""
        return "easyvqa" if self.is_easyvqa else None if self.source == OWN else self.source


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with a warm-up and a decay."""

    lr: float = number(1.125e-3, 0, 10, open_low=True)
    """Peak learning rate, absolute. The paper's 0.009 is a base rate: lr = 0.009 * samples per step / 256."""
    vision_lr: float | None = number(
        None, 0, 10, open_low=True, hint=", or null; to keep the ViT as it is, do not tune it (model.vision.train)"
    )
    """Peak learning rate of the ViT's own weights where they are tuned; null: `lr`."""
    llm_lr: float | None = number(
        None, 0, 10, open_low=True, hint=", or null; to keep the LLM as it is, do not tune it (model.llm.train)"
    )
    """Peak learning rate of the LLM's own weights where they are tuned; null: `lr`."""
    projector_lr: float | None = number(None, 0, 10, open_low=True, hint=", or null")
    """Peak learning rate of what stands between ViT and LLM where it is tuned: the neck of mmt, the projector of stock,
    query tokens, norm and projection of instructblip; null: `lr`."""
    schedule: Literal["cosine", "linear", "linear_epochs"] = "cosine"
    """How the learning rate falls after the warm-up. cosine, linear: step by step; linear_epochs: by the same amount
    after every epoch (the Q-Former paper's)."""
    min_lr_ratio: float = number(0.0, 0, 1)
    """What it falls to, as a share of the peak."""
    betas: tuple[float, float] = number((0.9, 0.95), 0, 1, open_high=True)
    eps: float = number(1e-8, 1e-30, 1)
    weight_decay: float = number(0.02, 0, 10)
    """On matrices only: biases and other 1-D parameters have none."""
    warmup_epochs: float = number(0.1, 0, 1e6)
    """Length of the linear warm-up."""
    clip: float = number(0.0, 0, 1e9)
    """Largest norm of the whole gradient; 0: no clipping (the paper's)."""

    def __post_init__(self) -> None:
        check_ranges(self, "optim")


@dataclass(kw_only=True)
class TrainConfig:
    """The loop."""

    epochs: float = number(1.0, 0, 1e6, open_low=True)
    """Passes over the packs, not necessarily whole ones: 0.3 trains on three tenths of them. Half a pack at least."""
    max_steps: int | None = number(None, 1, MOST_STEPS)
    """Stop after this many steps; the schedule is then this long too. It only ever shortens a run: more steps than
    `epochs` has are refused."""
    packs_per_step: int = number(2, 1, MOST_SIZE)
    """Packs of one optimizer step over all ranks: the global batch, the same for any number of ranks, which
    accumulate what they do not take at once."""
    balance: Literal["flops", "measured"] = "flops"
    """What decides which rank takes which pack of a step: the model's FLOPs, or seconds that a few packs took before
    the first step (kept in the run's checkpoints). Runs that measure may sum gradients in another order each
    time."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of matrix products and, unless `model.bits` says otherwise, of frozen weights. auto: bf16 where the hardware is
    fast at it or `model.bits` is 16, else fp32."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    keep_image_features: bool = False
    """Encode each image of the packs once, before the first step, and read its features from disk in every epoch
    (`features-KEY` in the packs' folder, which runs of the same tower share). Nothing that encodes images may be
    trained: of mmt and instructblip the ViT without neck and Q-Former, of stock tower and projector."""
    check: Literal["quick", "full", "none"] = "quick"
    """What is proven before the first step, on the run's own packs and ranks, and then put back bit for bit. quick, in
    less than three steps' time: the longest pack and the one with most images go through a step, and every gradient
    arrives where it should; full: all that `vltrain check recipe` looks at but the data report."""
    compile: bool = False
    """Compile the blocks of ViT and LLM with torch.compile, at the first step (minutes); of a stock model those of its
    LLM, whose tower stays plain: its sizes change with each image. With ZeRO 0 to 2, networks in 16 or 32 bits, and
    without activation checkpointing. It fuses norms, rotary embedding and SwiGLU itself: in training they are not
    Liger's."""
    deterministic: bool = True
    """The same run on the same machine gives the same bits, on a GPU too; evaluation and replay obey it as well. false:
    faster gradients of attention, whose sums then come in any order. On a CPU it changes nothing."""
    seed: int = number(0, 0, MOST_SEED)
    """Seed of the order of packs and of dropout."""
    log_every_steps: int = number(10, 1, MOST_STEPS)
    loggers: tuple[str, ...] = named("vltrain.metrics.table.LOGGERS", ("tensorboard",))
    """What gets the run's metrics, beside `log.jsonl`: tensorboard, wandb (`pip install 'vltrain[wandb]'`; its
    environment variables say where to, WANDB_MODE=offline without network), mlflow (`'vltrain[mlflow]'`,
    MLFLOW_TRACKING_URI). One that fails is left out, the run goes on. []: none."""
    save_every_steps: int = number(200, 1, MOST_STEPS)
    keep_checkpoints: int = number(2, 1, MOST_SIZE)
    """How many of the newest checkpoints are kept."""
    init_from: str | None = None
    """Begin a new run with the trained weights of another: a run's folder (its best checkpoint where `train.keep_best`
    kept one, else its newest), a checkpoint's, or one of `vltrain export` (adapters; lora where LoRA is all that was
    put in; an InstructBLIP's peft, or peft's own). Same shapes, or none there yet, over the same frozen weights;
    optimizer, schedule and data are this run's: more epochs, another learning rate, other data. null: fresh weights."""
    on_bad_loss: Literal["stop", "skip"] = "stop"
    """What to do with a step whose loss or gradient is NaN or Inf, or whose loss is a spike. stop: the run ends,
    samples are
    named; skip: its update is not applied, its samples are written to `quarantine.jsonl` in the run's folder, and the
    run goes on (the host waits for each step's loss)."""
    spike_factor: float | None = number(None, 1, 1e9, open_low=True)
    """A loss above this multiple of the mean of the last 50 steps is a spike; null: only NaN and Inf are bad."""
    hang_timeout_minutes: float | None = number(20.0, 0, 1e6, open_low=True)
    """If training makes no progress for this long, the rank that hangs is named and the run ends; null: never. A
    save, and
    a batch of an evaluation, may take six times as long."""
    async_save: bool = False
    """Write checkpoints while training goes on. Costs rank 0 a copy of the trainable state in host memory."""
    eval_every_steps: int = number(0, 0, MOST_STEPS)
    """Evaluate on `data.eval_split` every so many steps; 0: only at the end. Each evaluated step is saved
    first."""
    eval_every_epochs: float = number(0.0, 0, 1e6)
    """The same, in passes over the packs; one of both may be set."""
    keep_best: bool = False
    """Keep the checkpoint with the best evaluation, beside the newest; `checkpoints/best` names it."""
    early_stopping_patience: int | None = number(None, 1, MOST_STEPS)
    """Stop after so many evaluations in a row that are not better than the best one before them; null: never."""
    time_limit_minutes: float | None = number(None, 0, 1e7, open_low=True)
    """Time limit from the start, in minutes: before it the run saves and exits with code 85, to be started again.
    Slurm's limit (SLURM_JOB_END_TIME) is respected in any case, whichever is earlier; null: no limit of its own."""

    def __post_init__(self) -> None:
        check_ranges(self, "train")
        alone = self.eval_every_epochs == 0 or self.eval_every_steps == 0
        _require(alone, "train.eval_every_epochs", self.eval_every_epochs, "0 beside train.eval_every_steps")
        patience = self.early_stopping_patience
        if self.eval_every_steps == self.eval_every_epochs == 0 and (self.keep_best or patience is not None):
            name = "keep_best" if self.keep_best else "early_stopping_patience"
            raise InputError(
                f"train.{name}: has no effect: train.eval_every_steps = 0 evaluates at the end only; set it or "
                "leave this out"
            )


@dataclass(kw_only=True)
class EvalConfig:
    """How questions are answered, and how answers are scored."""

    scorer: str | None = named("vltrain.evaluate.report.SCORERS", "exact")
    """null: nothing is evaluated while training; `exact` (the answer, word for word), `scienceqa`, `iconqa`, `vqa` (VQA
    accuracy against ten answers), `caption` (CIDEr and BLEU), or `rouge` (how much of a longer text, such as a
    rationale, is the reference's)."""
    method: Literal["generate", "rank"] = "generate"
    """generate: the model writes an answer; rank: of a question's candidate answers the likeliest is taken (multiple
    choice)."""
    normalise_length: bool = False
    """rank: compare losses per token instead of their sums."""
    batch_size: int = number(64, 1, MOST_SIZE)
    """Questions (rank: candidates) answered at once by a rank; changes speed and memory. Where products are in fp32
    (`eval.precision`, `train.precision`) it changes no answer, unless two are equally likely to the last digits; in
    bf16 a near-tie may fall either way."""
    precision: Literal["train", "fp32"] = "train"
    """Of matrix products while answering. train: as `train.precision`; fp32: no batch size and no number of ranks
    changes an answer, at the price of fp32's speed and of widened copies of weights in bf16."""
    max_new_tokens: int | None = number(None, 1, MOST_SIZE)
    """Tokens that a generated answer may have; null: those of the split's longest reference, and a quarter or 8 more.
    Answers that reach it without an end are counted."""
    temperature: float = number(0.0, 1e-3, 1e3, or_zero=True)
    """0: greedy."""
    top_p: float = number(1.0, 0, 1, open_low=True)
    max_samples: int | None = number(512, 1, MOST_STEPS)
    """Questions of an evaluation while training; `vltrain evaluate` takes all."""
    spread: Literal["drawn", "even"] = "drawn"
    """Which questions `max_samples` takes: one of each of as many equal stretches of the file. drawn: by a hash of its
    id, so the same ones in every run; even: the first, which may be the same question about every image."""
    tensorboard_samples: int = number(16, 0, MOST_SIZE)
    """Answered questions written to TensorBoard with their images."""

    def __post_init__(self) -> None:
        check_ranges(self, "eval")


@dataclass(kw_only=True)
class Config:
    """A whole recipe."""

    model: ModelConfig = field(default_factory=MmtConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    output: str = "runs/quickstart"
    """The run's folder: resolved config, versions, TensorBoard events, checkpoints."""

    def __post_init__(self) -> None:
        _require_here("output", self.output)
        if self.train.init_from is not None and self.model.start is not None:
            key, folder = self.model.start
            raise InputError(
                f"train.init_from: found {self.train.init_from!r} beside {key} {folder!r}: both say what the tuned "
                "parameters start from; leave one out"
            )
        if self.model.bits == 8 and self.eval.precision == "fp32":
            raise InputError(
                "eval.precision: found 'fp32', but products of 8-bit weights (model.bits) are LLM.int8's, in "
                "which what is answered together decides what is "
                "rounded; take model.bits 4 or 16, or eval.precision train"
            )
        if self.model.bits == 16 and self.train.precision == "fp32":
            raise InputError(
                "model.bits: found 16, but bf16 weights make bf16 products and train.precision says fp32; "
                "take model.bits 32, or train.precision auto or bf16"
            )
