"""Trainers of a stock vision-language model, each to be held in a process of its own: ours, with and without kept image
features, and TRL's SFTTrainer; and their losses beside a plain loop."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.benchmarks.measure import trim_heap, wait_for_device
from tests.benchmarks.ours import DTYPES, OurSteps, our_trainer
from tests.benchmarks.peers import Held, plain_head, training_arguments
from tests.benchmarks.stock_setting import Photos, Setting, as_text, processor_of
from tests.benchmarks.train import DS
from vltrain.config.schema import Config
from vltrain.data.images import open_rgb
from vltrain.data.kept.store import KeptImages
from vltrain.data.loader import PREFETCH_PACKS, collate
from vltrain.data.reading import image_reader
from vltrain.data.shards import PackedDataset
from vltrain.distributed.hardware import device, peak_memory_bytes
from vltrain.models.build import build_model
from vltrain.schema import IGNORE_INDEX, Sample
from vltrain.train.determinism import set_determinism
from vltrain.train.kept_features import FeatureMaker
from vltrain.train.zero.engine import init_distributed, shutdown_distributed


@dataclass(kw_only=True)
class Competitor:
    """One that makes whole steps of its real loop.

    step: makes one; its useful tokens, a number on whichever device.
    close: ends it.
    now: a clock, in seconds.
    made_seconds: that making kept features took, checks and writing included.
    """

    step: Callable[[], Any]
    close: Callable[[], None]
    now: Callable[[], float]
    made_seconds: float = 0.0

    def __post_init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def run(self, warm_up: int, steps: int) -> tuple[int, float]:
        """(useful tokens, seconds) of so many steps after others that do not count. Memory that is then not in use is
        given back: to those whose turn comes."""
        for _ in range(warm_up):
            self.step()
        wait_for_device()
        start = self.now()
        tokens = [self.step() for _ in range(steps)]
        wait_for_device()
        seconds = self.now() - start
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        else:
            trim_heap()
        return sum(map(int, tokens)), seconds

    def facts(self) -> dict[str, float]:
        """Seconds for kept features; GiB at the peak: on a GPU torch's allocations, on a CPU the resident set."""
        return {"made_seconds": self.made_seconds, "peak_gib": peak_memory_bytes() / 2**30}


def ours(setting: Setting, name: str, threads: int | None, kept: bool) -> Competitor:
    """`kept`: with `train.keep_image_features`. threads: torch's; None: as it chooses."""
    _begin(threads)
    init_distributed()
    config = setting.config(name)
    config = replace(config, train=replace(config.train, keep_image_features=kept))
    took: list[float] = []
    make = FeatureMaker.kept

    def timed_make(maker: FeatureMaker) -> KeptImages:
        start = setting.now()
        found = make(maker)
        took.append(setting.now() - start)
        return found

    with patch.object(FeatureMaker, "kept", timed_make):
        steps = OurSteps(our_trainer(config, setting.packs, setting.dtype, ds=DS))

    def close() -> None:
        steps.trainer.monitor.close()
        steps.trainer.loader.close()
        shutdown_distributed()

    return Competitor(step=steps.step, close=close, now=setting.now, made_seconds=sum(took))


def trl(setting: Setting, name: str, threads: int | None, batch: int, more: dict[str, Any]) -> Competitor:
    """TRL's trainer on batches of `batch` samples. more: of its settings."""
    _begin(threads)
    # Of its workers: Linux' own, which a process that was spawned would not take. Its processor cannot be pickled.
    multiprocessing.set_start_method("fork", force=True)
    config = setting.config(name)
    network = peer_network(config, setting.dtype).to(device())
    trainer = trl_trainer(network, setting.photos, config, setting.dtype, batch, **more)
    held = Held(trainer, network)
    return Competitor(step=held.step, close=held.stop, now=setting.now)


def _begin(threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)
    set_determinism(False)  # which the others do not offer


def peer_network(config: Config, dtype: torch.dtype) -> Any:
    """The very network, updates and all, with transformers' own head and attention."""
    network: Any = build_model(config.model, dtype=dtype).network
    network.set_output_embeddings(plain_head(network.get_output_embeddings()))
    network.set_attn_implementation("sdpa")
    return network


ROUNDS = 1000  # of the samples in TRL's data: an end of an epoch would stop its workers


def trl_trainer(network: Any, photos: Photos, config: Config, dtype: torch.dtype, batch: int, **more: Any) -> Any:
    """TRL's SFTTrainer for vision-language models: the loss of answers alone, as ours. more: of its settings."""
    from datasets import Dataset, Sequence
    from datasets import Image as Picture
    from trl import SFTConfig, SFTTrainer

    rows = []
    for sample in photos.samples:
        prompt, answer = as_text(sample, processor_of(config))
        images = [{"bytes": photos.files[name], "path": None} for name in sample.images]
        rows.append({"images": images, "prompt": prompt, "completion": answer})
    data = Dataset.from_list(rows).cast_column("images", Sequence(Picture()))
    workers = config.data.workers
    arguments = {
        **training_arguments(config, dtype, batch, Path(config.output)),
        "max_length": None,
        "completion_only_loss": True,
        "ddp_find_unused_parameters": False,
        "dataloader_num_workers": workers,
        "dataloader_prefetch_factor": PREFETCH_PACKS if workers else None,
        **more,
    }
    return SFTTrainer(
        model=network,
        args=SFTConfig(**arguments),
        train_dataset=data.select(list(range(len(rows))) * ROUNDS),
        processing_class=processor_of(config),
    )


def largest_differences(setting: Setting, threads: int | None, compared: int, with_trl: bool) -> dict[str, float]:
    """By trainer and precision: the largest relative difference of losses to those of a plain loop in fp32.

    The plain loop is transformers' forward of a sample alone, its own logits and loss. Ours are losses of single
    samples in packs; TRL's that of one batch, against the mean over the answers' tokens of the same samples. Samples:
    those of as many packs as hold `compared`.
    """
    _begin(threads)
    torch.backends.cudnn.allow_tf32 = False
    config, dataset, photos = setting.config("losses"), setting.packs, setting.photos
    network = peer_network(config, torch.float32).to(device())
    plain = plain_losses(network, photos, config, dataset, compared)
    found = {}
    for precision in dict.fromkeys(("fp32", setting.precision)):
        dtype = DTYPES[precision]
        model = build_model(config.model, dtype=dtype, runs_on=device()).to(device())
        with torch.autocast(device().type, dtype=dtype, enabled=dtype != torch.float32):
            found[f"ours, {precision}"] = largest_difference(model, config, dataset, plain)
    if with_trl:
        found["TRL, fp32"] = trl_difference(network, photos, config, plain)
    return found


Plain = dict[str, tuple[float, int]]
"""By sample: (the sum of a plain loop's losses, label tokens)."""


@torch.no_grad()
def plain_losses(network: Any, photos: Photos, config: Config, dataset: PackedDataset, compared: int) -> Plain:
    """Of the samples of the first packs, `compared` at least."""
    pictures = {sample.id: [photos.files[name] for name in sample.images] for sample in photos.samples}
    found: Plain = {}
    for number in range(len(dataset)):
        row = dataset.row(number)
        ends = row.segment_lengths.cumsum().tolist()
        for name, length, end in zip(row.sample_ids, row.segment_lengths.tolist(), ends, strict=True):
            own = slice(end - length, end)
            ids, mask = torch.from_numpy(row.input_ids[own].astype("int64")), torch.from_numpy(row.loss_mask[own])
            images = [open_rgb(data, 10**8, name) for data in pictures[_id(name)]]
            made = processor_of(config).image_processor([images], return_tensors="pt") if images else {}
            given = {key: made[key] for key in ("pixel_values", "pixel_attention_mask") if key in made}
            given |= {"input_ids": ids[None], "labels": ids.masked_fill(~mask, IGNORE_INDEX)[None]}
            loss = network(**{key: one.to(device()) for key, one in given.items()}, use_cache=False).loss
            found[name] = float(loss) * int(mask.sum()), int(mask.sum())
        if len(found) >= compared:
            break
    return found


@torch.no_grad()
def largest_difference(model: Any, config: Config, dataset: PackedDataset, plain: Plain) -> float:
    """Of a sample's loss in our packs to the plain loop's, relative."""
    reader, worst, left = image_reader(config, model), 0.0, set(plain)
    for number in range(len(dataset)):
        if not left:
            break
        row = dataset.row(number)
        pictures = [reader.decode(dataset.image(image), "") for image in row.image_ids.tolist()]
        losses = model(collate(row, pictures, reader).to(device())).segment_losses.tolist()
        for name, loss in zip(row.sample_ids, losses, strict=True):
            worst = max(worst, abs(loss / plain[name][0] - 1))
            left.discard(name)
    return worst


@torch.no_grad()
def trl_difference(network: Any, photos: Photos, config: Config, plain: Plain) -> float:
    """Of the loss that TRL computes of one batch of the samples to the plain loop's mean, relative."""
    chosen: list[Sample] = [sample for sample in photos.samples if sample.id in set(map(_id, plain))]
    trainer = trl_trainer(network, replace(photos, samples=chosen), config, torch.float32, len(chosen))
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(len(chosen))])
    for row in batch["labels"]:  # the newline that the chat template puts behind an answer, which ours does not train
        row[(row != IGNORE_INDEX).nonzero()[-1]] = IGNORE_INDEX
    loss = float(trainer.compute_loss(network, {key: one.to(device()) for key, one in batch.items()}))
    sums, counts = zip(*plain.values())
    return abs(loss / (sum(sums) / sum(counts)) - 1)


def _id(name: str) -> str:
    """A sample's in its file, of what packs call it."""
    return name.rpartition("/")[2]
