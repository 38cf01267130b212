"""What a training run says of itself before its first step and after its last."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from vltrain.data.shards import PackedDataset
from vltrain.data.stream.mixed import MixedPacks
from vltrain.data.stream.mixing import WHOLE
from vltrain.data.text.spelling import describe_lost
from vltrain.metrics.tensorboard import FOLDER
from vltrain.train.trainer import Trainer

logger = logging.getLogger(__name__)

PartCounts = dict[str, tuple[int, int]]
"""Part of the model -> (parameters, those that are trained)."""


def announce(trainer: Trainer, parameters: PartCounts, dataset: PackedDataset) -> None:
    total, trainable = (sum(counts) for counts in zip(*parameters.values(), strict=True))
    parts = ", ".join(f"{part} {trained:,}" for part, (_, trained) in parameters.items() if trained)
    logger.info(
        "parameters: %s of %s are trained (%.2f%%): %s", f"{trainable:,}", f"{total:,}", 100 * trainable / total, parts
    )
    manifest = dataset.manifest
    logger.info(
        "data: %d samples in %d packs of %d tokens, %.2f%% full",
        manifest.num_samples,
        manifest.num_packs,
        manifest.pack_length,
        100 * manifest.fill,
    )
    for name, one in (dataset.sets if isinstance(dataset, MixedPacks) else {"": dataset}).items():
        for line in describe_lost(one.manifest.lost, one.manifest.num_samples):
            logger.warning("data: %s%s", f"{name}: " if name else "", line)
    for line in _sets(trainer) if isinstance(dataset, MixedPacks) else ():
        logger.info("data: %s", line)
    logger.info(
        "run: %d steps of %d packs on %d rank(s), ZeRO stage %d, from step %d, into %s",
        trainer.plan.num_steps,
        trainer.config.train.packs_per_step,
        trainer.engine.world_size,
        trainer.engine.stage,
        trainer.first_step,
        trainer.folder,
    )
    if "tensorboard" in trainer.config.train.loggers:
        logger.info("watch it: tensorboard --logdir %s", trainer.folder / FOLDER)


def _sets(trainer: Trainer) -> Iterator[str]:
    """Of each set of a mixture, how much of the run it is."""
    plan = trainer.plan
    counts = plan.mixing.counts(plan.num_trained)
    for number, name in enumerate(plan.mixing.names):
        share, packs, count = plan.mixing.shares[number] / WHOLE, plan.mixing.num_packs[number], counts[number]
        yield f"{name}: {share:.2%} of the packs, {count:,} times one of its {packs:,}: {count / packs:.3g} passes"


def log_trainable_share(parameters: PartCounts, full: int) -> None:
    """The paper's percentages: of low-rank updates, and of everything trained, against full tuning of the Q-Former."""
    updates, trained = parameters["peft"][1], sum(trained for _, trained in parameters.values())
    message = "of full Q-Former tuning (%s): low-rank updates %s (%.2f%%), everything trained %s (%.2f%%)"
    logger.info(message, f"{full:,}", f"{updates:,}", 100 * updates / full, f"{trained:,}", 100 * trained / full)


def summary(trainer: Trainer) -> str:
    """How the run ended, in a line."""
    loss, headline = trainer.monitor.last_loss, trainer.monitor.headline
    figures = [f"loss {loss:.4f}"] if loss is not None else []
    return ", ".join(
        [
            f"{trainer.folder}: {trainer.done} of {trainer.plan.num_steps} steps done",
            *figures,
            *([headline] if headline else []),
        ]
    )
