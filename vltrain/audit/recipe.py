"""What a recipe's model, or a model by its name, is audited as; and the audit that runs by itself before a first
step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from vltrain.audit.checks.processor import FILES, has_processor, require_readable
from vltrain.audit.findings import Report
from vltrain.audit.run import audit
from vltrain.audit.small.config import shrink
from vltrain.audit.stored import store_report, stored_report
from vltrain.audit.subjects import stock, text
from vltrain.audit.subjects.table import SUBJECTS, Section, is_known
from vltrain.config.command_line import load_settings
from vltrain.config.model.base import ModelConfig
from vltrain.config.recipe import has_rows, read_table
from vltrain.config.stages import load_stages
from vltrain.data.stock.encoder import StockEncoder
from vltrain.data.stock.source import StockSource
from vltrain.errors import InputError
from vltrain.families.config import config_from
from vltrain.files.locate import locate
from vltrain.memory.sizes import assume_sizes, is_here
from vltrain.models.architectures import architecture_of
from vltrain.models.pretrained.checkpoint_config import read_values
from vltrain.models.pretrained.quiet import quiet_transformers
from vltrain.models.stock.source import require_stock
from vltrain.shipped import find_recipe

logger = logging.getLogger(__name__)
AS_TUNED = ""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A model to audit. `ways`: by what they are, in words, small copies as it is tuned. `processor`: where its
    processor is, if it has one, and the model's config."""

    name: str
    ways: dict[str, Section]
    processor: tuple[StockSource, PreTrainedConfig] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What the findings follow from, plain values. Raises InputError for a processor that cannot be loaded."""
        of = None
        if self.processor is not None:
            source, config = self.processor
            said = {key: one for key, one in asdict(source).items() if key != "folder"}
            of = [said, StockEncoder(source).fingerprint, config.to_dict()]
        return {
            "processor": of,
            "ways": {title: [one.architecture, one.identity()] for title, one in self.ways.items()},
        }


def audits_of(name: str) -> list[Report]:
    """The reports of a model (folder or hub name) or of a recipe's models (rows, stages), each once. Raises
    InputError."""
    if not _is_recipe(name):
        return [_answer(_question_by_name(name))]
    found: dict[str, Question] = {}
    for model in _models_of(name):
        question = _planned(model)
        if question is None:
            known = " or ".join(one for one in SUBJECTS if one != "text")
            raise InputError(f"{name}: model.architecture: found {model.architecture}, expected {known} to audit")
        found.setdefault(str(question.identity), replace(question, name=name))
    return [_answer(one) for one in found.values()]


def require_audited(model: ModelConfig) -> None:
    """Audits a recipe's model unless it was audited before, and logs how it came out.

    Raises: InputError for a model that fails, in one line: what, by how much, and where.
    """
    question = question_of(model)
    if question is None:
        return
    if question.processor is not None:
        require_readable(question.processor[0])
    report = stored_report(question.identity)
    if report is None:
        report = _answer(question, trainer=False)
        store_report(question.identity, report)
        logger.info("audit: %s: %d checks passed in %.0f s", report.kind, report.num_passed, report.seconds)
    if not report.passed:
        raise InputError(f"audit: {report.refusal()}; vltrain audit RECIPE shows all of it")


def question_of(model: ModelConfig) -> Question | None:
    """A recipe's model as a question; None for an architecture that says nothing to audit it by."""
    architecture = architecture_of(model)
    configs = architecture.configs(model)
    if not configs or architecture.resized is None or not is_known(model):
        return None
    small = architecture.resized(model, {name: shrink(one).config for name, one in configs.items()})
    name = next((source for source in reversed(model.bases.values()) if source), model.architecture)
    processor = None if model.processor is None else (StockSource.of(model.processor), configs["model"])
    return Question(name=name, ways={AS_TUNED: small}, processor=processor)


def _question_by_name(name: str) -> Question:
    place = locate(name)
    path = Path(place, "config.json")
    if Path(place).is_dir() and not path.is_file():
        raise InputError(f"{place}: found no config.json, expected the folder of a model, or a recipe")
    where = f"{path if path.is_file() else place}"
    with quiet_transformers():
        config = config_from(where, read_values("MODEL", name, place, {}))
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return Question(name=name, ways=ways_of(name, config))
    source = StockSource(key="MODEL", processor=name, model=name, config="{}", options="{}")
    return Question(name=name, ways=ways_of(name, config), processor=(source, config) if has_processor(name) else None)


def ways_of(name: str, config: PreTrainedConfig) -> dict[str, Section]:
    """The usual ways to tune a small copy of a model. Raises InputError for one of another kind, or refused."""
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        small = shrink(config).config  # whose special tokens lie in its vocabulary, where a class's defaults may not
        require_stock(name, small)
        return {**stock.usual_tunings(small)}
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return {**text.usual_tunings(shrink(config).config)}
    raise InputError(
        f"{name}: a model of type {config.model_type!r} is neither a language model nor a vision-language model of "
        "transformers'"
    )


def _models_of(name: str) -> Iterator[ModelConfig]:
    path = find_recipe(name, "vltrain audit")
    if has_rows(path):
        table = read_table(path)
        for row in table.rows:
            argv = ["--recipe", str(table.recipe_of(row))]
            yield load_settings(argv, options={}, program="vltrain audit", checks_effect=False).config.model
        return
    for part in load_stages(["--recipe", name], options={}, program="vltrain audit").parts:
        yield part.config.model


def _planned(model: ModelConfig) -> Question | None:
    """A recipe's model as a question, with published sizes where it is not on this machine, and without a processor
    that is not."""
    sized, assumed = assume_sizes(model)
    for line in assumed:
        logger.info("%s", line)
    question = question_of(sized)
    if question is None or question.processor is None or is_here(question.processor[0].processor, FILES):
        return question
    logger.info("the processor %s is not on this machine, and nothing is said of it", question.processor[0].processor)
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
    return audit(question.name, question.ways, processor=question.processor, trainer=trainer)
