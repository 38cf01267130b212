"""Evaluations of a run while it trains: the same questions each time, or a warning."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vltrain.config.mixture import each_set
from vltrain.config.schema import Config
from vltrain.data.sample_files import samples_file
from vltrain.data.text.encoder import SampleEncoder
from vltrain.evaluate.report import mean_of, write_mean
from vltrain.evaluate.run import ReportTo, SplitSetup, evaluate_split, mean_title
from vltrain.evaluate.scorers.scoring import Report
from vltrain.files.digest import file_digest
from vltrain.train.run.identity import MADE_OF, FilesOf
from vltrain.train.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluatedSet:
    """A set of samples that is evaluated: a recipe of it alone, its split's file, and the file's digest when the run
    began."""

    config: Config
    samples: Path
    digest: str


def evaluated_sets(config: Config) -> dict[str, EvaluatedSet]:
    """Those that have a scorer, by name; of a recipe without a mixture the one, under no name."""
    found: dict[str, EvaluatedSet] = {}
    for name, one in each_set(config).items():
        if one.eval.scorer is not None:
            file = samples_file(one, one.data.eval_split)
            found[name] = EvaluatedSet(config=one, samples=file, digest=file_digest(file))
    return found


@dataclass(frozen=True, kw_only=True)
class SplitEvaluation:
    """Of `data.eval_split`, of each set.

    Args:
        sets: of `evaluated_sets`.
        made_of: digests of the files that weights and tokenizer come from, for metrics.json.
    """

    encoder: SampleEncoder
    sets: Mapping[str, EvaluatedSet]
    made_of: FilesOf

    def __call__(self, trainer: Trainer, steps_done: int) -> float | None:
        """Evaluates, and logs the reports. On rank 0 the metric, of several sets the unweighted mean of theirs; None
        elsewhere. A collective."""
        setups = [self._setup(trainer, name, one) for name, one in self.sets.items()]
        found = {setup.name: self._evaluate(trainer, steps_done, setup) for setup in setups}
        reports = {name: report for name, report in found.items() if report is not None}
        if not reports:
            return None
        figures = [f"{setup.title} {reports[setup.name].headline()}" for setup in setups]
        if not trainer.config.data.mixture:
            trainer.monitor.headline = figures[0]
            return reports[""].mean
        mean, title = mean_of(reports), mean_title(setups)
        write_mean(reports, trainer.folder / f"{title}.json", {"step": steps_done})
        trainer.loggers.scalars({title: mean}, steps_done)
        told = f"unweighted mean of {len(reports)} set(s) {mean:.4f}"
        logger.info("after %d steps: %s", steps_done, told)
        trainer.monitor.headline = f"{told} ({'; '.join(figures)})"
        return mean

    def _setup(self, trainer: Trainer, name: str, one: EvaluatedSet) -> SplitSetup:
        return SplitSetup(
            split=one.config.data.eval_split,
            name=name,
            samples_file=one.samples,
            encoder=self.encoder,
            config=one.config,
            device=trainer.engine.device,
            max_samples=one.config.eval.max_samples,
        )

    def _evaluate(self, trainer: Trainer, steps_done: int, setup: SplitSetup) -> Report | None:
        """One set's report on rank 0, None elsewhere."""
        digest = file_digest(setup.samples_file)
        if digest != self.sets[setup.name].digest and trainer.rank == 0:
            logger.warning(
                "%s: was changed since the run began (a --rebuild of the same data.root?): figures before and from "
                "here on are of other questions",
                setup.samples_file,
            )
        facts = {MADE_OF: self.made_of, "samples": digest}
        report_to = ReportTo(step=steps_done, folder=trainer.folder, loggers=trainer.loggers, facts=facts)
        report = evaluate_split(trainer.engine.model, setup, report_to, trainer.safety.watchdog.goes_on)
        if report is not None:
            logger.info("after %d steps, %s: %s", steps_done, setup.title, report.headline())
            for line in report.lines():
                logger.warning("%s: %s", setup.title, line)
        return report
