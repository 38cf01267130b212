"""Evaluations of a run while it trains: the same questions each time, or a warning."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from vltrain.data.text.encoder import SampleEncoder
from vltrain.evaluate.run import ReportTo, SplitSetup, evaluate_split
from vltrain.files.digest import file_digest
from vltrain.train.run.identity import MADE_OF, FilesOf
from vltrain.train.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SplitEvaluation:
    """Of `data.eval_split`.

    Args:
        samples: the split's file.
        digest: of that file when the run began.
        made_of: digests of the files that weights and tokenizer come from, for metrics.json.
    """

    encoder: SampleEncoder
    samples: Path
    digest: str
    made_of: FilesOf

    def __call__(self, trainer: Trainer, steps_done: int) -> float | None:
        """Evaluates, and logs the report. Its metric on rank 0, None elsewhere. A collective."""
        config, split = trainer.config, trainer.config.data.eval_split
        found = file_digest(self.samples)
        if found != self.digest and trainer.rank == 0:
            logger.warning(
                "%s: was changed since the run began (a --rebuild of the same data.root?): figures before and from "
                "here on are of other questions",
                self.samples,
            )
        setup = SplitSetup(
            split=split,
            samples_file=self.samples,
            encoder=self.encoder,
            config=config,
            device=trainer.engine.device,
            max_samples=config.eval.max_samples,
        )
        facts = {MADE_OF: self.made_of, "samples": found}
        report_to = ReportTo(step=steps_done, folder=trainer.folder, loggers=trainer.loggers, facts=facts)
        report = evaluate_split(trainer.engine.model, setup, report_to, trainer.safety.watchdog.goes_on)
        if report is None:
            return None
        trainer.monitor.headline = f"{split} {report.headline()}"
        logger.info("after %d steps, %s: %s", steps_done, split, report.headline())
        for line in report.lines():
            logger.warning("%s: %s", split, line)
        return report.mean
