"""What is checked before a run's first step, and what becomes of it.

none    nothing
quick   rehearsal of the longest pack and the one with most images, census of their gradients
full    all kinds of packs twice
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from vltrain.data.report import packed
from vltrain.data.report.finding import FAILED, WARNING, Finding
from vltrain.data.text.encoder import SampleEncoder
from vltrain.distributed.broadcast import from_rank_0
from vltrain.errors import InputError
from vltrain.preflight.finite import finite_weights
from vltrain.preflight.loss import loss_scale
from vltrain.preflight.packing import packing_proof, repeatable
from vltrain.preflight.ranks import agreed
from vltrain.preflight.rehearsal import rehearse
from vltrain.preflight.samples import small_pack
from vltrain.preflight.trial import trial
from vltrain.train.trainer import Trainer

logger = logging.getLogger(__name__)

MOST_PACKS = 16  # whose labels are read before a run


def check(trainer: Trainer, *, everything: bool) -> list[Finding]:
    """What all ranks found; the trainer is afterwards what it was. A collective.

    Raises: OutOfMemory on a rank on which a pack does not fit.
    """
    with trial(trainer) as snapshot:
        own = agreed([finite_weights(trainer)])
        if _fails(own):  # what follows would meet the same fault, or wait for ranks
            return own
        rehearsal = rehearse(trainer, snapshot, everything=everything)
        own += agreed(rehearsal.findings)
        if _fails(own):
            return own
        pack = small_pack(trainer.loader, trainer.engine.model)
        if everything:  # what losses and gradients that are compared depend on
            own += agreed([repeatable(trainer, pack)])
            if _fails(own):
                return own
            own += agreed([loss_scale(trainer, rehearsal.loaded)])
        return own + agreed(packing_proof(trainer, pack, everything=everything))


def _fails(found: Sequence[Finding]) -> bool:
    return any(one.status == FAILED for one in found)


def _labels(trainer: Trainer, encoder: SampleEncoder) -> Finding:
    return packed.labels(packed.parts_of(trainer.loader.dataset, MOST_PACKS), {}, encoder.tokenizer, encoder.stop_ids)


def check_before_training(trainer: Trainer, encoder: SampleEncoder) -> None:
    """The check that a run's recipe asks for (`train.check`), with its cost in the log. A collective.

    Args:
        encoder: of its packs.

    Raises: InputError on every rank where something fails, in one line.
    """
    asked = trainer.config.train.check
    if asked == "none" or trainer.first_step >= trainer.plan.num_steps:
        return
    began = time.perf_counter()
    findings = from_rank_0([_labels(trainer, encoder)] if trainer.rank == 0 else [])
    if not _fails(findings):
        findings += check(trainer, everything=asked == "full")
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
