"""Whether a split can be answered and scored, found out before anything is: before a training run's first step, and
before an evaluation.

Every sample of the file is read, and looked at as its scorer would: metadata, candidates, contradictions. Of those that
will be answered the images must be there, with a header that is read. It takes some 30 microseconds a sample and 100 an
image, on every rank: all refuse the same, and none waits for another.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vltrain.config.schema import Config
from vltrain.data.images import require_image
from vltrain.errors import InputError
from vltrain.evaluate.answering.ranking import to_item
from vltrain.evaluate.report import find_scorer
from vltrain.evaluate.samples import draw_samples, read_samples, thin_out
from vltrain.evaluate.scorers.question import question_of
from vltrain.schema import Sample


def require_scorer(config: Config) -> None:
    """Raises InputError unless `eval.scorer` names a scorer whose packages are installed."""
    if config.eval.scorer is None:
        raise InputError(
            "eval.scorer: found null, which leaves evaluation out; name the scorer of these samples "
            "(--eval.scorer exact)"
        )
    find_scorer(config.eval.scorer).require_installed()


class Split(NamedTuple):
    """`every`: all samples of the file; `answered`: those that are."""

    every: list[Sample]
    answered: list[Sample]


def answerable_samples(samples_file: Path, config: Config, max_samples: int | None) -> Split:
    """A split of which at most `max_samples` are answered, spread over the file as `eval.spread` says; None: all.

    Raises:
        InputError: no such split, an unknown scorer or one that is not installed, a malformed sample, an id that comes
            twice, one that lacks what the scorer or ranking needs or contradicts itself, fewer than the scorer takes,
            an image that is missing or no image.
    """
    require_scorer(config)
    assert config.eval.scorer is not None
    scorer = find_scorer(config.eval.scorer)
    if not samples_file.exists():
        ways = (
            "name one that is there (data.eval_split while training, --split), prepare the data anew with another "
            "val_fraction or test_fraction"
        )
        raise InputError(f"{missing_split(samples_file)}; {ways}, or train without evaluation (eval.scorer: null)")
    samples = read_samples(samples_file)
    for sample in samples:
        question = question_of(sample, str(samples_file))
        scorer.needs(question)
        scorer.columns(question)
        if config.eval.method == "rank":
            to_item(sample, str(samples_file))
    answered = (draw_samples if config.eval.spread == "drawn" else thin_out)(samples, max_samples)
    if len(answered) < scorer.fewest:
        bound = f", of which eval.max_samples takes {max_samples}" if len(answered) < len(samples) else ""
        found = (
            f"found {len(samples)} sample(s){bound}; eval.scorer {config.eval.scorer} expects {scorer.fewest} or more"
        )
        raise InputError(f"{samples_file}: {found}")
    folder = samples_file.parent
    first_user = {name: sample.id for sample in reversed(answered) for name in sample.images}
    for name, sample_id in first_user.items():
        require_image(
            folder / name,
            config.data.max_image_pixels,
            f"{samples_file}: sample '{sample_id}': {folder / name}",
            inside=folder,
        )
    return Split(samples, answered)


def missing_split(samples_file: Path) -> str:
    """What is there instead of the file of a split."""
    there = sorted(path.stem for path in samples_file.parent.glob("*.jsonl"))
    found = f"splits there: {', '.join(there)}" if there else "there is no split at all"
    return f"{samples_file}: no such file, so there is no split '{samples_file.stem}'; {found}"
