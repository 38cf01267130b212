"""One evaluation: a split's questions answered by all ranks, scored, written and shown by rank 0.

    samples.jsonl -> shard over ranks -> generate or rank -> gather on rank 0 -> score
        -> RUN/eval/SPLIT/{predictions.jsonl, metrics.json, table.md}, the run's loggers

Used by the trainer in its loop, with the model under DeepSpeed, and by `vltrain evaluate` with a plain one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from PIL import Image

from vltrain.config.schema import Config
from vltrain.console import Progress
from vltrain.data.images import open_rgb, read_image, sizes_below
from vltrain.data.pictures import Pictures, pictures_below
from vltrain.data.reading import image_reader
from vltrain.data.text.encoder import SampleEncoder
from vltrain.data.text.tokenizer import Tokenizer
from vltrain.evaluate.answering.candidates import CANDIDATES
from vltrain.evaluate.answering.decoding import Sampling, Sync, alone
from vltrain.evaluate.answering.generate import generate
from vltrain.evaluate.answering.precision import products_in_fp32
from vltrain.evaluate.answering.ranking import rank, to_item
from vltrain.evaluate.gallery import draw_card
from vltrain.evaluate.questions import Questions, ask, indistinguishable, unspellable
from vltrain.evaluate.ready import answerable_samples
from vltrain.evaluate.report import score_samples, write_report
from vltrain.evaluate.samples import shard_samples, thin_out
from vltrain.evaluate.scorers.scoring import Remark, Report
from vltrain.metrics.base import MetricLogger
from vltrain.models.interface import VisionLanguageModel
from vltrain.schema import Sample


class Said(NamedTuple):
    """An answer; `cut`: it had as many tokens as it may have, and no end."""

    text: str
    cut: bool


@dataclass(frozen=True, kw_only=True)
class SplitSetup:
    """A split, and how it is asked.

    Args:
        name: of the set, where there are several; "" where there is one.
        samples_file: JSONL; images are found beside it.
        max_samples: None: all.
        device: the model's.
    """

    split: str
    name: str = ""
    samples_file: Path
    encoder: SampleEncoder
    config: Config
    device: torch.device | str
    max_samples: int | None = None

    @property
    def title(self) -> str:
        """What it is called in files, logs and loggers: SPLIT, or SET/SPLIT."""
        return f"{self.name}/{self.split}" if self.name else self.split

    @property
    def called(self) -> dict[str, str]:
        """The same, for metrics.json."""
        return {**({"set": self.name} if self.name else {}), "split": self.split}

    def pictures(self, model: VisionLanguageModel) -> Pictures:
        """The split's images, as the model reads them."""
        config = self.config
        return pictures_below(self.samples_file.parent, image_reader(config, model), config.data.max_image_pixels)


def mean_title(setups: Sequence[SplitSetup]) -> str:
    """What the sets' mean is called in files and loggers: eval/mean_of_sets/SPLIT, or the splits where they differ."""
    return f"eval/mean_of_sets/{'-'.join(dict.fromkeys(setup.split for setup in setups))}"


@dataclass(frozen=True, kw_only=True)
class ReportTo:
    """Where rank 0 takes the report.

    Args:
        step: optimizer steps that the model has behind it.
        folder: the run's, for `eval/SPLIT/predictions.jsonl`, `metrics.json` and `table.md`. None: nowhere.
        loggers: get `eval/SPLIT/accuracy` (or what the scorer calls its measure), the columns, further figures, and
            some questions with their images.
        facts: which weights answer: plain JSON for metrics.json, beside the split and the step.
    """

    step: int
    folder: Path | None = None
    loggers: MetricLogger | None = None
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])


def evaluate_split(
    model: VisionLanguageModel, setup: SplitSetup, report_to: ReportTo, on_progress: Callable[[], object] = lambda: None
) -> Report | None:
    """Answers and scores the questions of a split. A collective: all ranks call it with the same arguments.

    Args:
        model: in evaluation mode, plain or under DeepSpeed at any ZeRO stage; the caller's autocast context holds.
        on_progress: called after every batch.

    Returns: the report on rank 0, None elsewhere.

    Raises: InputError as `answerable_samples`, before anything is answered; for an image that is damaged behind its
    header; and for a folder that cannot be written to.
    """
    config, tokenizer, where = setup.config, setup.encoder.tokenizer, str(setup.samples_file)
    every, samples = answerable_samples(setup.samples_file, config, setup.max_samples)
    assert config.eval.scorer is not None
    questions = ask(samples, every, setup.encoder, config, model, setup.samples_file)
    answered = predict(model, samples, questions, setup, on_progress=on_progress)
    if answered is None:
        return None
    report = score_samples(config.eval.scorer, samples, [answer.text for answer in answered], where)
    report = replace(report, remarks=_remarks(samples, answered, questions, tokenizer, config, where))
    if report_to.folder is not None:
        facts = {**setup.called, "step": report_to.step, **report_to.facts}
        write_report(report, report_to.folder / "eval" / setup.title, facts)
    if report_to.loggers is not None:
        _show(report_to.loggers, report, samples, setup, report_to.step)
    return report


def predict(
    model: VisionLanguageModel,
    samples: list[Sample],
    questions: Questions,
    setup: SplitSetup,
    *,
    on_progress: Callable[[], object] = lambda: None,
) -> list[Said] | None:
    """The model's answers, one for each sample, on rank 0; None elsewhere. A collective."""
    rank_number, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = shard_samples(samples, rank_number, world_size)
    precision = products_in_fp32(model, setup.device) if setup.config.eval.precision == "fp32" else nullcontext()
    title = f"evaluate {setup.title}"
    with precision, Progress(total=len(samples), title=title, unit="question", shown=rank_number == 0) as progress:
        answer = (
            _rank if setup.config.eval.method == "rank" else functools.partial(_generate, questions=questions, own=own)
        )
        answers = answer(
            model,
            [samples[number] for number in own],
            setup,
            sync=largest_over_ranks(setup.device) if world_size > 1 and is_sharded(model) else alone,
            on_answered=lambda count: (
                on_progress(),
                progress.update(min(count * world_size, len(samples) - progress.done)),
            ),
        )
    texts = list(zip(own, answers, strict=True))
    if world_size == 1:
        return [text for _, text in sorted(texts)]
    gathered: list[Any] | None = [None] * world_size if rank_number == 0 else None
    dist.gather_object(texts, gathered)
    return None if gathered is None else [text for _, text in sorted(pair for share in gathered for pair in share)]


def _generate(
    model: VisionLanguageModel,
    samples: list[Sample],
    setup: SplitSetup,
    *,
    questions: Questions,
    own: list[int],
    sync: Sync,
    on_answered: Callable[[int], object],
) -> list[Said]:
    """The text that the model writes in answer to each sample, the `own` ones of all that are asked."""
    chosen, config, tokenizer = setup.config.eval, setup.config, setup.encoder.tokenizer
    answers = generate(
        model,
        [questions.prompts[number] for number in own],
        setup.pictures(model),
        sampling=Sampling(
            max_new_tokens=questions.max_new_tokens,
            temperature=chosen.temperature,
            top_p=chosen.top_p,
            seed=config.train.seed,
        ),
        stop_ids=setup.encoder.stop_ids,
        vocab_size=tokenizer.vocab_size,
        batch_size=chosen.batch_size,
        device=setup.device,
        sync=sync,
        on_answered=on_answered,
    )
    # Whatever ends an answer is not among its tokens, so one that has them all was not ended.
    return [Said(tokenizer.decode(answer).strip(), len(answer) == questions.max_new_tokens) for answer in answers]


def _rank(
    model: VisionLanguageModel,
    samples: list[Sample],
    setup: SplitSetup,
    *,
    sync: Sync,
    on_answered: Callable[[int], object],
) -> list[Said]:
    """The likeliest candidate of each sample."""
    config = setup.config
    size_of = sizes_below(setup.samples_file.parent, config.data.max_image_pixels)
    candidates = CANDIDATES[model.ranks](
        model=model, encoder=setup.encoder, pictures=setup.pictures(model), size_of=size_of, device=setup.device
    )
    items = [to_item(sample, str(setup.samples_file)) for sample in samples]
    winners = rank(
        candidates,
        items,
        batch_size=config.eval.batch_size,
        normalise_length=config.eval.normalise_length,
        sync=sync,
        on_answered=on_answered,
    )
    return [Said(item.candidates[winner], False) for item, winner in zip(items, winners, strict=True)]


def _remarks(
    samples: list[Sample], answered: list[Said], questions: Questions, tokenizer: Tokenizer, config: Config, where: str
) -> dict[str, Remark]:
    """What the figures do not say by themselves."""
    if config.eval.method == "rank":
        alike = indistinguishable(samples, tokenizer, where)
        text = (
            f"{len(alike)} question(s) have candidates that are the same tokens for this vocabulary, so that the "
            f"first one is taken: {', '.join(alike[:3])}"
        )
        return {"indistinguishable": Remark(len(alike), text)}
    cut = [sample.id for sample, answer in zip(samples, answered, strict=True) if answer.cut]
    assert config.eval.scorer is not None, "an evaluation has a scorer"
    lost = unspellable(samples, tokenizer, config.eval.scorer, where)
    example = f"; '{lost[0][0]}': {lost[0][1]!r:.80} is {lost[0][2]!r:.80} in its tokens" if lost else ""
    limit = (
        f"{len(cut)} answer(s) were cut at eval.max_new_tokens = {questions.max_new_tokens} and judged as they are: "
        f"{', '.join(cut[:3])}"
    )
    return {
        "cut": Remark(len(cut), limit),
        "unspellable": Remark(
            len(lost),
            f"{len(lost)} reference(s) cannot be spelled by this vocabulary, so no answer equals them{example}",
        ),
    }


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether ranks hold parts of the weights (ZeRO-3), so that every forward is a collective."""
    return any(hasattr(parameter, "ds_tensor") for parameter in model.parameters())


def largest_over_ranks(device: torch.device | str) -> Sync:
    """The `sync` of ranks that make every forward together: an all-reduce on the model's device."""

    def largest(value: int) -> int:
        shared = torch.tensor(value, device=device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)  # pyright: ignore[reportUnknownMemberType] argument of no type
        return int(shared)

    return largest


def _show(loggers: MetricLogger, report: Report, samples: list[Sample], setup: SplitSetup, step: int) -> None:
    """Accuracies and a fixed, evenly spaced choice of answered questions, by their ids: however many are asked, a
    name shows the same question over the steps."""
    config, split, image_folder = setup.config, setup.title, setup.samples_file.parent
    figures = {
        report.measure: report.mean,
        "failed_share": report.failed / max(report.overall.total, 1),
        **{
            f"{report.measure}_by/{name}": tally.mean
            for name, tally in report.columns.items()
            if tally.mean is not None and name != "Average"
        },
        **report.figures,
    }
    loggers.scalars({f"eval/{split}/{name}": value for name, value in figures.items()}, step)
    loggers.text(f"eval/{split}/table", report.to_markdown(), step)
    shown = thin_out(list(range(len(samples))), config.eval.tensorboard_samples)
    cards: dict[str, Image.Image] = {}
    limit = config.data.max_image_pixels
    for number in shown:
        names = samples[number].images
        images = [
            open_rgb(read_image(path, limit, str(path), inside=image_folder), limit, str(path))
            for path in (image_folder / name for name in names)
        ]
        cards[samples[number].id] = draw_card(report.answers[number], images)
    loggers.images(f"eval/{split}", cards, step)
    loggers.flush()
