"""ScienceQA (Lu et al., 2022) from its official files: problems.json, pid_splits.json, images/{split}/{pid}/image.png.

A prompt format is INPUT-OUTPUT. Input letters, in order: C context (hint), Q question, M options, then L lecture and E
explanation where the input shows them, or G a rationale. Output letters, in order: A answer, L lecture, E explanation,
P (as L and E) of LLaVA's LEPA.
`QCM-ALE`, the paper's: "Question: ... Context: ... Options: (A) ... (B) ...  Response:" -> "The answer is A. BECAUSE:
lecture explanation".
Each format does what its letters say; where lecture and explanation are empty, no "BECAUSE:" is left standing.

Multimodal-CoT (https://arxiv.org/abs/2302.00923) is two runs. The first, `QCM-LE`, learns the rationale (lecture and
explanation, "N/A" where there is neither) without the answer. The second, `QCMG-A`, reads a rationale behind the
options ("Solution: ...") and learns the answer. Val and test questions always show what the first run wrote (option
`rationales`), never the data's own; train questions show the data's own, as its authors do, or with
`train_rationales: generated` what the first run wrote about them too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.reading import is_there
from data_prep.sources.options import resolve_options
from data_prep.sources.raw import RawSample, ids_of, image_name
from vltrain.errors import InputError, nearest
from vltrain.evaluate.predictions import name_some, read_predictions
from vltrain.files.strict_json import field, read_object, shown, texts
from vltrain.schema import IMAGE_MARKER, Sample, Turn, escape_markers

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
INPUTS = tuple(order + shown for order in ("CQM", "QCM") for shown in ("", "L", "E", "LE", "G"))
OUTPUTS = ("A", "LA", "EA", "LEA", "ELA", "AL", "AE", "ALE", "LEPA", "LE")
FORMATS = tuple(
    f"{given}-{wanted}" for given in INPUTS for wanted in OUTPUTS if given in ("CQM", "QCM") or wanted == "A"
)


def read(input: Path | None, options: Mapping[str, Any]) -> Iterator[RawSample]:
    """Reads all splits.

    Args:
        input: the folder of the official files.
        options: `prompt_format` (QCM-ALE); `missing_images`: `error`, or `drop` to leave such questions out, each one
            printed; and for formats with G `rationales`, a run's folder (its `eval/SPLIT/predictions.jsonl` are read)
            or a file of {pid: text}, and `train_rationales`: `gold` or `generated`.

    Raises:
        InputError: a missing file or field, an answer that is none of the choices, an unknown format, a question
            without a rationale or a rationale without a question: named with file, pid and key.
    """
    resolved = _resolved(options)
    if input is None:
        raise InputError("source 'scienceqa' needs --input, the folder with problems.json, pid_splits.json and images/")
    problems, splits = read_object(input / "problems.json"), read_object(input / "pid_splits.json")
    for split in ("train", "val", "test"):
        rationales = _rationales(resolved, split, splits)
        for pid in ids_of(splits, split, str(input / "pid_splits.json")):
            if pid not in problems:
                raise InputError(
                    f"{input / 'pid_splits.json'}: split '{split}' names problem '{pid}', which problems.json lacks"
                )
            where = f"{input / 'problems.json'}: problem '{pid}'"
            problem = checked(problems[pid], where)
            image = (
                input / "images" / split / pid / image_name(problem, "image", where) if problem.get("image") else None
            )
            if image is not None and not is_there(image):
                require_dropped(resolved["missing_images"], image, where)
                print(f"dropped: problem '{pid}', no image {image}")
                continue
            yield to_sample(pid, split, problem, image, resolved["prompt_format"], rationales.of(pid, problem))


def require_dropped(missing_images: str, image: Path, where: str) -> None:
    """Raises InputError for a question without its image, unless the option says that such are left out."""
    if missing_images != "drop":
        raise InputError(
            f"{where}: its image {image} cannot be read (no such file); get it, or leave such questions out: "
            "--options missing_images=drop"
        )


def _resolved(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, checked one by one and against each other."""
    defaults = {"prompt_format": "QCM-ALE", "missing_images": "error", "rationales": None, "train_rationales": "gold"}
    resolved = resolve_options("scienceqa", options, defaults)
    if resolved["prompt_format"] not in FORMATS:
        raise InputError(
            f"prompt_format: unknown '{resolved['prompt_format']}', {nearest(resolved['prompt_format'], FORMATS)}"
        )
    for name, known in (("missing_images", ("error", "drop")), ("train_rationales", ("gold", "generated"))):
        if resolved[name] not in known:
            raise InputError(f"{name}: found '{resolved[name]}', expected {' or '.join(known)}")
    reads_rationales = resolved["prompt_format"].split("-")[0].endswith("G")
    if reads_rationales and resolved["rationales"] is None:
        needed = "rationales: the folder of the run that wrote them, or a file of {pid: text}"
        raise InputError(f"prompt_format {resolved['prompt_format']} needs the option {needed}")
    if not reads_rationales and (resolved["rationales"] is not None or resolved["train_rationales"] != "gold"):
        name = "rationales" if resolved["rationales"] is not None else "train_rationales"
        raise InputError(
            f"{name}: has no effect: prompt_format {resolved['prompt_format']} shows no rationale; QCMG-A does"
        )
    return resolved


@dataclass(frozen=True)
class Rationales:
    """What G shows in one split. `written`: by pid, read from `where`; None: the data's own."""

    written: Mapping[str, str] | None
    where: str = ""

    def of(self, pid: str, problem: dict[str, Any]) -> str:
        """The rationale of a problem. Raises InputError if the file has none; an empty one is one."""
        if self.written is None:
            return answer_of(problem, "LE")
        if pid not in self.written:
            raise InputError(
                f"{self.where}: no rationale of problem '{pid}'; answer the whole split: vltrain evaluate RUN "
                "--split SPLIT"
            )
        return self.written[pid]


def _rationales(resolved: Mapping[str, Any], split: str, splits: Mapping[str, Any]) -> Rationales:
    """Those of a split: the data's own only where the format shows none, or for training."""
    if (
        resolved["rationales"] is None
        or (split == "train" and resolved["train_rationales"] == "gold")
        or not splits.get(split)
    ):
        return Rationales(None)
    place = Path(resolved["rationales"])
    file = place / "eval" / split / "predictions.jsonl" if place.is_dir() else place
    if not file.is_file():
        expected = "expected a run's folder or a file of {pid: text}"
        way_out = f"write it: vltrain evaluate {place} --split {split}" if place.is_dir() else expected
        raise InputError(f"rationales: {file}: no such file; {way_out}")
    written = read_predictions(file)
    splits_of_file = (split,) if place.is_dir() else tuple(splits)
    unknown = written.keys() - {pid for name in splits_of_file for pid in ids_of(splits, name, "pid_splits.json")}
    if unknown:
        named = (
            f"{len(unknown)} problem(s) that are not in {', '.join(splits_of_file)} of pid_splits.json "
            f"({name_some(unknown)})"
        )
        raise InputError(f"{file}: rationales of {named}; are they of another data set or split?")
    return Rationales(written, str(file))


def checked(problem: Any, where: str) -> dict[str, Any]:
    """The problem, after its fields have been looked at. Raises InputError naming `where` and the key."""
    for name in ("question", "grade", "subject"):
        field(problem, name, str, where)
    for name in ("hint", "lecture", "solution"):  # may be empty
        if type(problem.get(name)) is not str:
            raise InputError(
                f"{where}: {name}: found {shown(problem[name]) if name in problem else 'nothing'}, expected a text"
            )
    for name in ("image", "skill"):  # may be missing
        if problem.get(name) not in (None, ""):
            field(problem, name, str, where)
    texts(problem, "choices", where)
    field(problem, "answer", int, where)
    if not 2 <= len(problem["choices"]) <= len(LETTERS):
        raise InputError(f"{where}: choices: found {len(problem['choices'])}, expected 2 to {len(LETTERS)}")
    if not 0 <= problem["answer"] < len(problem["choices"]):
        raise InputError(
            f"{where}: answer: found {problem['answer']}, expected 0 to {len(problem['choices']) - 1}, one of "
            "the choices"
        )
    return problem


def to_sample(
    pid: str, split: str, problem: dict[str, Any], image: Path | None, prompt_format: str, rationale: str = ""
) -> RawSample:  # fmt: skip
    """One problem as a sample in the given format. `rationale`: what G shows."""
    given, wanted = prompt_format.split("-")
    prompt = prompt_of(problem, given, rationale)
    metadata = {name: problem[name] for name in ("choices", "answer", "subject", "hint", "grade")}
    if wanted.startswith("A"):  # what the answer can begin with; behind a rationale there is nothing to rank
        metadata["candidates"] = [
            answer_of({**problem, "answer": number}, "A") for number in range(len(problem["choices"]))
        ]
    sample = Sample(
        id=pid,
        turns=(
            Turn(role="user", text=f"{IMAGE_MARKER}\n{prompt}" if image else prompt),
            Turn(role="assistant", text=escape_markers(answer_of(problem, wanted))),
        ),
        images=(f"{split}/{pid}/{image.name}",) if image else (),
        metadata=metadata,
    )
    return RawSample(split=split, sample=sample, image_sources=(image,) if image else ())


def prompt_of(problem: dict[str, Any], given: str, rationale: str = "") -> str:
    """The question as the input letters order it, as a turn holds it: `<image>` in the data's own text is escaped."""
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem["choices"]))
    parts = {
        "Q": f"Question: {problem['question']}",
        "C": f"Context: {problem['hint'].strip() or 'N/A'}",
        "M": f"Options: {options}",
        "L": f"BECAUSE: {problem['lecture'].strip()}",
        "E": problem["solution"].strip(),
        "G": f"Solution: {rationale.strip() or 'N/A'}",
    }
    if "L" not in given and parts["E"]:
        parts["E"] = f"BECAUSE: {parts['E']}"
    shown = [parts[letter] for letter in given if parts[letter] not in ("", "BECAUSE: ")]
    return escape_markers("\n".join([*shown, "Response:"]))


def answer_of(problem: dict[str, Any], wanted: str) -> str:
    """The target text as the output letters order it, not escaped."""
    answer = f"The answer is {LETTERS[problem['answer']]}."
    texts = {"L": problem["lecture"].strip(), "E": problem["solution"].strip()}
    reason = " ".join(texts[letter] for letter in wanted if texts.get(letter))
    if "A" not in wanted and "P" not in wanted:
        return reason or "N/A"
    if wanted.startswith("A"):
        return f"{answer} BECAUSE: {reason}" if reason else answer
    return f"{reason} {answer}".strip()
