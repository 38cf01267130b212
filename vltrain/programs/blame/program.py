"""`vltrain blame RUN`: which samples did what to a run, in one HTML file that loads and runs nothing.

    vltrain blame RUN --step K [--out FILE] [--packs FOLDER]

makes step K of the run once more, in one process, from the newest checkpoint before it or from the start, and shows of
each of its samples: image, conversation, tokens coloured by loss, loss before and after the step, the norm of its part
of the gradient, its neighbours in the pack, and its loss each time that it was seen; and the log around the step.
Nothing is changed in the run's folder.

    vltrain blame RUN --spike [--out FILE] [--packs FOLDER]

the same of the step whose loss jumps most: the largest multiple of the mean of the (up to) 50 losses before it.

    vltrain blame RUN [--worst 20] [--out FILE] [--packs FOLDER]

the samples that look mislabelled by the run's history: whose loss lay furthest above the median of their steps, in the
mean of all passes; and those that were forgotten: right once, their loss has risen since. Tokens are coloured by the
newest checkpoint's losses.

--out        the new file; default: blame-step-K.html or blame-worst-N.html, in this folder
--packs      where the run's packs are now, if they have moved

examples:
    vltrain blame runs/quickstart --worst 20
    vltrain blame runs/quickstart --step 57 --out step57.html
    vltrain blame runs/quickstart --spike
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vltrain.config.command_line import COMMAND_LINE, FLAGS, Arguments, split_arguments
from vltrain.config.schema import Config
from vltrain.console import last_line, start_logging
from vltrain.data.folder import refuse_existing_file
from vltrain.data.reading import recipe_tokenizer
from vltrain.data.remote.address import place_of
from vltrain.data.remote.cache import CacheSettings
from vltrain.data.shards import MANIFEST
from vltrain.data.stream.mixed import open_packed
from vltrain.errors import InputError, exits_cleanly
from vltrain.files.atomic import write_whole
from vltrain.html.markup import Markup, page, tag
from vltrain.html.packs import PackPage, legend
from vltrain.inference.run import recipe_of
from vltrain.launching.run_folder import why_not_writable
from vltrain.metrics.step_log import LOG, read_step_log
from vltrain.programs.blame.drawing import Cards, Story, by_loss, log_charts, number, step_columns
from vltrain.programs.blame.ranking import RIGHT, Place, SampleHistory, Scores, spike
from vltrain.receipts.history import read_history
from vltrain.receipts.receipt import RECEIPT, read_receipt
from vltrain.train.checkpoints.checkpoint import newest_checkpoint
from vltrain.train.guard import WINDOW_STEPS

WORST, MOST = 20, 1000
OPTIONS = ("step", "worst", "spike", "out", "packs")


@exits_cleanly
def main(argv: list[str], *, program: str = "vltrain blame") -> int:
    """Writes the page that the command line asks for. Returns the exit code."""
    arguments = split_arguments(argv, flags=(*FLAGS, "spike"))
    if ("help", None) in arguments.options:
        print((__doc__ or "").strip())
        return 0
    arguments.require_known((*OPTIONS, "help"))
    if len(arguments.positionals) != 1:
        raise InputError(f"{COMMAND_LINE}: found {len(arguments.positionals)} folder(s), expected {program} RUN")
    asked = [name for name in ("step", "worst", "spike") if name in dict(arguments.options)]
    if len(asked) > 1:
        raise InputError(f"{COMMAND_LINE}: found --{' and --'.join(asked)}, expected one of them")
    start_logging()
    packs = arguments.last("packs")
    step, worst = arguments.whole("step", 0), arguments.whole("worst", 1, MOST)
    subject = _Run(Path(arguments.positionals[0]), place_of(packs) if packs else None)
    if asked == ["spike"]:
        step, found, before = spike({one: told["loss"] for one, told in subject.log.items()})
        times = (
            "is not finite"
            if not math.isfinite(found)
            else f"is {found / before:.3g} times the mean, {number(before)},"
        )
        why = f"Its loss {number(found)} {times} of the (up to) {WINDOW_STEPS} steps before: the largest jump of all."
        return _step(subject, step, why, _output(arguments, f"blame-step-{step}.html"))
    if step is not None:
        return _step(subject, step, "", _output(arguments, f"blame-step-{step}.html"))
    return _worst(subject, worst or WORST, _output(arguments, f"blame-worst-{worst or WORST}.html"))


def _output(arguments: Arguments, default: str) -> Path:
    output = Path(arguments.last("out") or default)
    refuse_existing_file(output)
    if reason := why_not_writable(output.parent):
        raise InputError(f"{output}: cannot be written ({reason}); name another file with --out")
    return output


class _Run:
    """A run with its packs, its history and its log. Raises InputError where one is missing or of another run."""

    def __init__(self, folder: Path, packs: Path | str | None) -> None:
        self.folder = folder
        self.config: Config = recipe_of(folder)
        history, header = read_history(folder), read_receipt(folder / RECEIPT).header
        self.log = read_step_log(folder / LOG)
        self.packs = packs or place_of(header.packs)
        if isinstance(self.packs, Path) and not (self.packs / MANIFEST).is_file():
            raise InputError(
                f"{self.packs}: the run's packs are not there; name where they are now with --packs FOLDER"
            )
        self.dataset = open_packed(self.packs, verify=False, cache=CacheSettings.of(self.config.data))
        if not self.dataset.manifest.checksum == header.data == history.data:
            raise InputError(
                f"{self.packs}: not the packs that {folder} was trained on; name those with --packs FOLDER"
            )
        self.samples = SampleHistory(history, header, self.dataset)
        if not self.samples.steps:
            raise InputError(f"{history.path}: holds no step yet; train the run first")

    def cards(self, stories: Sequence[Story], step: int | None = None) -> Cards:
        page = PackPage(self.dataset, recipe_tokenizer(self.config), self.config.data.max_image_pixels)
        return Cards(page, stories, (self.samples.steps[0], self.samples.steps[-1]), step)

    def name(self, place: Place) -> str:
        return self.dataset.sample_ids(place.pack)[place.segment]


def _step(subject: _Run, step: int, why: str, output: Path) -> int:
    """Writes the page of a step."""
    from vltrain.programs.blame.measuring import measure_step  # with DeepSpeed, which takes seconds to load

    steps = subject.samples.steps
    if not steps[0] <= step <= min(steps[-1] + 1, subject.samples.num_steps - 1):  # it may have stopped at one more
        raise InputError(f"--step: found {step}, expected one that the run has done, {steps[0]} to {steps[-1]}")
    measured = measure_step(subject.folder, step, subject.packs)
    seen = subject.samples.seen(list(measured.samples))
    recorded = _recorded(subject, step) if step in steps else {}
    stories = [
        Story(place=place, name=subject.name(place), seen=seen[place], measured=one, recorded=recorded.get(place))
        for place, one in measured.samples.items()
    ]
    stories.sort(key=by_loss)
    told = (
        f"{len(stories)} samples in {len({one.pack for one in seen})} pack(s); loss {number(measured.loss)}, gradient "
        f"norm {number(measured.gradient_norm)}. Steps {measured.first_step} to {step} were made again in one process; "
        "then each sample alone, without dropout. Gradient norm: of the sample's part of the step's loss; the parts "
        "add up to the step's gradient."
    )
    skipped = "" if measured.applied else "The run skipped this step's update, so nothing changed after it. "
    cards = subject.cards(stories, step)
    document = page(
        f"Step {step} of {subject.folder}",
        tag("p", why) if why else Markup(""),
        tag("p", skipped + told, Class="note"),
        log_charts(subject.log, step),
        tag("h2", "Samples, largest loss first"),
        cards.table(stories, step_columns(stories)),
        legend(by_loss=True),
        *cards.draw(),
    )
    write_whole(output, document)
    last_line(f"{output}: step {step} of {subject.folder}, {len(stories)} samples; largest loss: {stories[0].name}")
    return 0


def _recorded(subject: _Run, step: int) -> dict[Place, float]:
    """What the history says of a step's samples."""
    packs, losses = subject.samples.losses(step)
    lengths = subject.dataset.index.num_samples
    places = [Place(pack, segment) for pack in packs.tolist() for segment in range(int(lengths[pack]))]
    return dict(zip(places, losses.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class _Worst:
    """The samples that stand out: suspects and forgotten ones, each the worst first; scores: of all samples."""

    suspects: list[Story]
    forgotten: list[Story]
    scores: Scores


def _worst(subject: _Run, count: int, output: Path) -> int:
    """Writes the page of the samples that stand out in the history."""
    found = _stand_out(subject, count)
    every = {story.place: story for story in (*found.suspects, *found.forgotten)}
    by_what = "The run has no checkpoint, so tokens are coloured by label alone."
    if newest_checkpoint(subject.folder / "checkpoints") is not None:
        from vltrain.programs.blame.measuring import measure_now  # as above

        measured, behind = measure_now(subject.folder, list(every), subject.packs)
        every = {place: dataclasses.replace(story, measured=measured[place]) for place, story in every.items()}
        by_what = f"Tokens are coloured by their losses under the newest checkpoint, after {behind} steps."
    scores, samples = found.scores, subject.samples
    seen = int((scores.passes > 0).sum())
    steps, cards = samples.steps, subject.cards(list(every.values()))
    document = page(
        f"Samples that stand out in {subject.folder}",
        tag("p", f"Of {seen} samples that steps {steps[0]} to {steps[-1]} saw. {by_what}", Class="note"),
        tag("h2", "Suspects: mislabelled, or hard"),
        tag("p", _SUSPECTS, Class="note"),
        cards.table(found.suspects, _columns(found.suspects, scores, samples)),
        tag("h2", "Forgotten: right once, wrong later"),
        tag("p", _FORGOTTEN, Class="note") if found.forgotten else tag("p", "None.", Class="note"),
        cards.table(found.forgotten, _columns(found.forgotten, scores, samples)) if found.forgotten else Markup(""),
        tag("h2", "Each of them"),
        legend(by_loss=any(story.measured is not None for story in every.values())),
        *cards.draw(),
    )
    write_whole(output, document)
    told = f"{len(found.suspects)} suspects, the first {found.suspects[0].name}; {len(found.forgotten)} forgotten"
    last_line(f"{output}: {told}")
    return 0


_SUSPECTS = (
    "Ordered by how far a sample's loss lay above the median of its step, in the mean of its passes (nats per label "
    "token). A wrong label stays far above; so does a sample that is hard."
)
_FORGOTTEN = (
    f"Samples whose loss was below {RIGHT:.2f} once (the label more likely than not) and above it in their last pass, "
    "by how far it rose."
)


def _stand_out(subject: _Run, count: int) -> _Worst:
    samples = subject.samples
    scores = samples.scores()
    chosen = [scores.suspects()[:count].tolist(), scores.forgotten()[:count].tolist()]
    places = {one: samples.place(one) for one in dict.fromkeys(chosen[0] + chosen[1])}
    if not places:
        raise InputError(f"{subject.folder}: its history has no loss of a sample; nothing can be ranked")
    seen = samples.seen(list(places.values()))
    suspects, forgotten = (
        [
            Story(
                place=places[one],
                name=subject.name(places[one]),
                seen=seen[places[one]],
                suspicion=float(scores.suspicion[one]),
            )
            for one in group
        ]
        for group in chosen
    )
    return _Worst(suspects=suspects, forgotten=forgotten, scores=scores)


def _columns(stories: list[Story], scores: Scores, samples: SampleHistory) -> dict[str, list[str]]:
    """The columns of samples that stand out."""
    numbers = [samples.number(story.place) for story in stories]
    return {
        "above median": [number(float(scores.suspicion[one])) for one in numbers],
        "lowest before": [number(float(scores.lowest[one])) if scores.passes[one] > 1 else "" for one in numbers],
        "last loss": [number(float(scores.last[one])) for one in numbers],
        "seen": [str(int(scores.passes[one])) for one in numbers],
        "pack": [str(story.place.pack) for story in stories],
    }
