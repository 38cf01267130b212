"""What a recipe's model, or a model by its name, is audited as; and the audit that runs by itself before a first
step."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from vltrain.audit.checks.processor import FILES, has_processor, require_readable
from vltrain.audit.findings import Report
from vltrain.audit.run import audit, config_of, is_vision, model_values
from vltrain.audit.small.config import shrink
from vltrain.audit.stored import store_report, stored_report
from vltrain.config.model.base import ModelConfig
from vltrain.config.stages import load_stages
from vltrain.data.stock.encoder import StockEncoder
from vltrain.data.stock.source import StockSource
from vltrain.errors import InputError
from vltrain.memory.sizes import assume_sizes, is_here
from vltrain.models.architectures import architecture_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A model to audit. `tunings`: by what they are, in words, the ways a recipe tunes it; {}: the usual ones.
    `processor`: where its processor is, if it has one."""

    name: str
    config: PreTrainedConfig
    tunings: dict[str, ModelConfig] = field(default_factory=dict)
    processor: StockSource | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What the findings follow from, plain values. Raises InputError for a processor that cannot be loaded."""
        source = self.processor
        return {
            "config": self.config.to_dict(),
            "processor": None if source is None else [asdict(source), StockEncoder(source).fingerprint],
            "tunings": {title: section.identity() for title, section in self.tunings.items()},
        }


def audits_of(name: str) -> list[Report]:
    """The reports of a model (folder or hub name) or of a recipe's models, each once. Raises InputError."""
    return [_answer(one) for one in _questions_of(name)]


def require_audited(model: ModelConfig) -> None:
    """Audits a recipe's model unless it was audited before, and logs how it came out.

    Raises: InputError for a processor that can't be used, and for a model that fails, in one line: what, by how much,
    and where.
    """
    question = question_of(model)
    if question is None:
        return
    if question.processor is not None:
        require_readable(question.processor)
    report = stored_report(question.identity)
    if report is None:
        report = _answer(question, trainer=False)
        store_report(question.identity, report)
        logger.info("audit: %s: %d checks passed in %.0f s", report.kind, report.num_passed, report.seconds)
    if not report.passed:
        raise InputError(f"audit: {report.refusal()}; vltrain audit {question.name} shows all of it")


def question_of(model: ModelConfig) -> Question | None:
    """A recipe's model as a question; None for an architecture of which nothing is a whole network of transformers'."""
    architecture = architecture_of(model)
    config = architecture.whole(model)
    if config is None:
        return None
    name = next((source for source in reversed(model.bases.values()) if source), config.model_type)
    tunings = {} if architecture.resized is None else {"as the recipe tunes it": model}
    processor = None if model.processor is None else StockSource.of(model.processor)
    return Question(name=name, config=config, tunings=tunings, processor=processor)


def _questions_of(name: str) -> list[Question]:
    if not _is_recipe(name):
        where, values = model_values(name)
        processor = None
        if has_processor(name):
            processor = StockSource(key="MODEL", processor=name, model=name, config="{}", options="{}")
        config = config_of(where, values)
        return [Question(name=name, config=config, processor=processor if is_vision(config) else None)]
    parts = load_stages(["--recipe", name], options={}, program="vltrain audit").parts
    questions = [(part.config.model, _planned(part.config.model)) for part in parts]
    for model, question in questions:
        if question is None:
            raise InputError(
                f"{name}: model.architecture: found {model.architecture}, expected mmt or stock: no class of "
                "transformers is a whole of this one, to compare it with"
            )
    return [
        question
        for place, (_, question) in enumerate(questions)
        if question is not None and question not in [before for _, before in questions[:place]]
    ]


def _planned(model: ModelConfig) -> Question | None:
    """A recipe's model as a question, with published sizes where it is not on this machine, and without a processor
    that is not."""
    sized, assumed = assume_sizes(model)
    for line in assumed:
        logger.info("%s", line)
    question = question_of(sized)
    if question is None or question.processor is None or is_here(question.processor.processor, FILES):
        return question
    logger.info("the processor %s is not on this machine, and nothing is said of it", question.processor.processor)
    return replace(question, processor=None)


def _is_recipe(name: str) -> bool:
    """A file, a row of one, or the name of one that comes with vltrain; everything else is a model's."""
    path = Path(name.rpartition("#")[0] or name)
    if path.is_dir():
        return False
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return True
    return "/" not in name and "://" not in name


def _answer(question: Question, *, trainer: bool = True) -> Report:
    tunings: dict[str, ModelConfig] = {}
    for title, model in question.tunings.items():
        resized = architecture_of(model).resized
        assert resized is not None, "question_of asked for it"
        tunings[title] = resized(model, shrink(question.config).config)
    return audit(question.name, question.config, tunings, processor=question.processor, trainer=trainer)
