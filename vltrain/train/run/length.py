"""How long a run is, and whether what it is asked to do on the way ever happens: found out before its first step."""

from __future__ import annotations

import logging
from collections.abc import Callable

from vltrain.config.schema import Config, TrainConfig
from vltrain.data.plan import length_of
from vltrain.data.stream.mixing import Mixing
from vltrain.errors import InputError

logger = logging.getLogger(__name__)

Refuse = Callable[[str], None]

LEAST_PACKS = 0.5  # of all epochs together: fewer would round to no step


def require_reachable(config: Config, packs: Mixing, world_size: int, *, resumed: bool) -> None:
    """Checks what the recipe says of steps and epochs against the data.

    Args:
        packs: those there are, of all sets.
        resumed: the run goes on from a checkpoint: what it was started with is told instead of refused.

    Raises:
        InputError: `train.epochs` of no pack, `train.max_steps` beyond `train.epochs`, evaluations that never come
            though `train.keep_best` or `train.early_stopping_patience` choose by them.
    """
    refuse: Refuse = logger.warning if resumed else _refuse
    train = config.train
    num_packs: float = packs.epoch
    positions, num_steps = length_of(packs, train.epochs, train.packs_per_step, train.max_steps)
    _require_steps(train, num_packs, num_steps, refuse)
    _require_evaluations(config, num_packs, num_steps, refuse)
    if num_packs < train.packs_per_step:
        logger.warning(
            "data: %g pack(s), fewer than train.packs_per_step = %d: a step takes all of them, and those of "
            "several epochs at once; a lower data.pack_length makes more packs",
            num_packs,
            train.packs_per_step,
        )
    in_a_step = min(train.packs_per_step, positions)
    if in_a_step < world_size:
        logger.warning(
            "a step has %d pack(s) for %d ranks: the others compute on fillers; raise train.packs_per_step, or "
            "take fewer ranks",
            in_a_step,
            world_size,
        )
    if config.optim.warmup_epochs * (num_packs / train.packs_per_step) >= num_steps > 1:
        logger.warning(
            "optim.warmup_epochs: %g is as long as the run, which never reaches optim.lr", config.optim.warmup_epochs
        )


def _require_steps(train: TrainConfig, num_packs: float, num_steps: int, refuse: Refuse) -> None:
    """As long as it says."""
    if train.epochs * num_packs < LEAST_PACKS:
        refuse(
            f"train.epochs: found {train.epochs:g}, less than half a pack of the {num_packs:g} there are; "
            f"expected {LEAST_PACKS / num_packs:g} or more"
        )
    if train.max_steps is not None and train.max_steps > num_steps:
        needed = (train.max_steps - 1) * train.packs_per_step + 1
        found = (
            f"found {train.max_steps}, but train.epochs = {train.epochs:g} of {num_packs:g} pack(s), "
            f"{train.packs_per_step} a step, ends after {num_steps} steps"
        )
        refuse(
            f"train.max_steps: {found}; raise train.epochs to {_rounded_up(needed / num_packs)}, or leave "
            "train.max_steps out"
        )


def _require_evaluations(config: Config, num_packs: float, num_steps: int, refuse: Refuse) -> None:
    """Evaluations come while it trains, and what chooses by them chooses by what is not reported."""
    train, steps_per_epoch = config.train, num_packs / config.train.packs_per_step
    every = train.eval_every_steps or train.eval_every_epochs * steps_per_epoch
    if every >= num_steps + 1:
        name = "eval_every_steps" if train.eval_every_steps else "eval_every_epochs"
        found = (
            f"found {getattr(train, name):g}, but the run ends after {num_steps} steps, "
            f"{num_steps / steps_per_epoch:.3g} epochs: it evaluates at the end only"
        )
        if train.keep_best or train.early_stopping_patience is not None:  # which then have no effect
            refuse(f"train.{name}: {found}; lower it, or leave out train.keep_best and train.early_stopping_patience")
        else:  # a recipe that is cut short by train.max_steps, to try it
            logger.warning("train.%s: %s", name, found)
    patience = train.early_stopping_patience
    if patience is not None and every > 0 and -(-num_steps // every) <= patience:
        logger.warning(
            "train.early_stopping_patience: never stops this run, which evaluates %d time(s)", -(-num_steps // every)
        )
    if (train.keep_best or patience is not None) and config.data.eval_split == config.data.test_split:
        message = (
            "data.test_split: '%s' also chooses the checkpoint (data.eval_split): figures on it are biased; hold "
            "out another split to report"
        )
        logger.warning(message, config.data.test_split)
    if config.eval.scorer is not None and config.data.eval_split == config.data.train_split:
        logger.warning(
            "data.eval_split: '%s' is what is trained on: figures on it measure memorisation",
            config.data.eval_split,
        )


def _refuse(message: str) -> None:
    raise InputError(message)


def _rounded_up(epochs: float) -> str:
    """A number of epochs that is enough, with few digits."""
    return f"{-(-epochs * 1000 // 1) / 1000:g}"
