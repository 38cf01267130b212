"""What is checked before a run's first step, and what becomes of it.

none    nothing
quick   rehearsal of the longest pack and the one with most images, census of their gradients
full    all kinds of packs twice
"""

from __future__ import annotations

import logging
import time

from vltrain.data.report.finding import FAILED, WARNING, Finding
from vltrain.errors import InputError
from vltrain.preflight.loss import loss_scale
from vltrain.preflight.packing import packing_proof
from vltrain.preflight.ranks import agreed
from vltrain.preflight.rehearsal import rehearse
from vltrain.preflight.trial import trial
from vltrain.train.trainer import Trainer

logger = logging.getLogger(__name__)


def check(trainer: Trainer, *, everything: bool) -> list[Finding]:
    """What all ranks found; the trainer is afterwards what it was. A collective.

    Raises: OutOfMemory on a rank on which a pack does not fit.
    """
    with trial(trainer):
        rehearsal = rehearse(trainer, everything=everything)
        own = agreed(rehearsal.findings)
        if any(one.status == FAILED for one in own):  # what follows would meet the same fault, or wait for ranks
            return own
        own += agreed(packing_proof(trainer, everything=everything))
        if everything:
            own += agreed([loss_scale(trainer, rehearsal.loaded)])
        return own


def check_before_training(trainer: Trainer) -> None:
    """The check that a run's recipe asks for (`train.check`), with its cost in the log. A collective.

    Raises: InputError on every rank where something fails, in one line.
    """
    asked = trainer.config.train.check
    if asked == "none" or trainer.first_step >= trainer.plan.num_steps:
        return
    began = time.perf_counter()
    findings = check(trainer, everything=asked == "full")
    trainer.monitor.pause()
    failed = [one for one in findings if one.status == FAILED]
    if failed:
        more = f"; {len(failed) - 1} more fail" if len(failed) > 1 else ""
        raise InputError(
            f"check before the first step: {failed[0].what}: {failed[0].found}{more}; vltrain check recipe shows all, "
            "--train.check none goes past it"
        )
    if trainer.rank == 0:
        for one in findings:
            if one.status == WARNING:
                logger.warning("check: %s: %s", one.what, one.found)
        logger.info(
            "check (%s): %d of %d passed in %.1f s", asked, len(findings), len(findings), time.perf_counter() - began
        )
