"""ScienceQA (Lu et al., 2022) from its official files: problems.json, pid_splits.json, images/{split}/{pid}/image.png.

A prompt format is INPUT-OUTPUT. Input letters, in order: C context (hint), Q question, M options, then L lecture and E explanation
where the input shows them. Output letters, in order: A answer, L lecture, E explanation, P (as L and E) of LLaVA's LEPA.
`QCM-ALE`, the paper's: "Question: ... Context: ... Options: (A) ... (B) ...  Response:" -> "The answer is A. BECAUSE: lecture explanation".
Each format does what its letters say; where lecture and explanation are empty, no "BECAUSE:" is left standing. `LE` alone is
the rationale without the answer, "N/A" where there is none: the first of the two stages of Multimodal-CoT (https://arxiv.org/abs/2302.00923).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.sources.options import settle
from data_prep.sources.raw import RawSample, read_json
from vltrain.errors import InputError, nearest
from vltrain.schema import IMAGE_MARKER, Sample, Turn

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
INPUTS = tuple(order + shown for order in ("CQM", "QCM") for shown in ("", "L", "E", "LE"))
OUTPUTS = ("A", "LA", "EA", "LEA", "ELA", "AL", "AE", "ALE", "LEPA", "LE")
FORMATS = tuple(f"{given}-{wanted}" for given in INPUTS for wanted in OUTPUTS if given in ("CQM", "QCM") or wanted == "A")
FIELDS = {"question": str, "choices": list, "answer": int, "hint": str, "grade": str, "subject": str, "lecture": str, "solution": str}


def read(input: Path | None, options: Mapping[str, Any]) -> Iterator[RawSample]:
    """Reads all splits.

    Args:
        input: the folder of the official files.
        options: `prompt_format` (QCM-ALE) and `missing_images`: `error`, or `drop` to leave such questions out, each one printed.

    Raises:
        InputError: a missing file or field, an answer that is none of the choices, an unknown format: named with file, pid and key.
    """
    settled = settle("scienceqa", options, {"prompt_format": "QCM-ALE", "missing_images": "error"})
    if settled["prompt_format"] not in FORMATS:
        raise InputError(f"prompt_format: unknown '{settled['prompt_format']}', {nearest(settled['prompt_format'], FORMATS)}")
    if settled["missing_images"] not in ("error", "drop"):
        raise InputError(f"missing_images: found '{settled['missing_images']}', expected error or drop")
    if input is None:
        raise InputError("source 'scienceqa' needs --input, the folder with problems.json, pid_splits.json and images/")
    problems, splits = read_json(input / "problems.json"), read_json(input / "pid_splits.json")
    for split in ("train", "val", "test"):
        for pid in splits.get(split, ()):
            if pid not in problems:
                raise InputError(f"{input / 'pid_splits.json'}: split '{split}' names problem '{pid}', which problems.json lacks")
            problem = checked(problems[pid], f"{input / 'problems.json'}: problem '{pid}'")
            image = input / "images" / split / pid / str(problem["image"]) if problem.get("image") else None
            if image is not None and settled["missing_images"] == "drop" and not image.is_file():
                print(f"dropped: problem '{pid}', no image {image}")
                continue
            yield to_sample(pid, split, problem, image, settled["prompt_format"])


def checked(problem: Any, where: str) -> dict[str, Any]:
    """The problem, after its fields have been looked at. Raises InputError naming `where` and the key."""
    for name, kind in FIELDS.items():
        if not isinstance(problem, dict) or type(problem.get(name)) is not kind:
            found = problem.get(name) if isinstance(problem, dict) else problem
            raise InputError(f"{where}: {name}: found {found!r}, expected {kind.__name__}")
    if not 2 <= len(problem["choices"]) <= len(LETTERS):
        raise InputError(f"{where}: choices: found {len(problem['choices'])}, expected 2 to {len(LETTERS)}")
    if not 0 <= problem["answer"] < len(problem["choices"]):
        raise InputError(f"{where}: answer: found {problem['answer']}, expected 0 to {len(problem['choices']) - 1}, one of the choices")
    return problem


def to_sample(pid: str, split: str, problem: dict[str, Any], image: Path | None, prompt_format: str) -> RawSample:
    """One problem as a sample in the given format."""
    given, wanted = prompt_format.split("-")
    prompt = prompt_of(problem, given)
    metadata = {name: problem[name] for name in ("choices", "answer", "subject", "hint", "grade")}
    if wanted.startswith("A"):  # what the answer can begin with; behind a rationale there is nothing to rank
        metadata["candidates"] = [answer_of({**problem, "answer": number}, "A") for number in range(len(problem["choices"]))]
    sample = Sample(
        id=pid,
        turns=(
            Turn(role="user", text=f"{IMAGE_MARKER}\n{prompt}" if image else prompt),
            Turn(role="assistant", text=answer_of(problem, wanted)),
        ),
        images=(f"{split}/{pid}/{image.name}",) if image else (),
        metadata=metadata,
    )
    return RawSample(split=split, sample=sample, image_sources=(image,) if image else ())


def prompt_of(problem: dict[str, Any], given: str) -> str:
    """The question as the input letters order it. `<image>` in the data's own text would be taken for an image, so it loses its brackets."""
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem["choices"]))
    parts = {
        "Q": f"Question: {problem['question']}", "C": f"Context: {problem['hint'].strip() or 'N/A'}", "M": f"Options: {options}",
        "L": f"BECAUSE: {problem['lecture'].strip()}", "E": problem["solution"].strip(),
    }  # fmt: skip
    if "L" not in given and parts["E"]:
        parts["E"] = f"BECAUSE: {parts['E']}"
    shown = [parts[letter] for letter in given if parts[letter] not in ("", "BECAUSE: ")]
    return "\n".join([*shown, "Response:"]).replace(IMAGE_MARKER, "image")


def answer_of(problem: dict[str, Any], wanted: str) -> str:
    """The target text as the output letters order it."""
    answer = f"The answer is {LETTERS[problem['answer']]}."
    texts = {"L": problem["lecture"].strip(), "E": problem["solution"].strip()}
    reason = " ".join(texts[letter] for letter in wanted if texts.get(letter))
    if "A" not in wanted and "P" not in wanted:
        text = reason or "N/A"
    elif wanted.startswith("A"):
        text = f"{answer} BECAUSE: {reason}" if reason else answer
    else:
        text = f"{reason} {answer}".strip()
    return text.replace(IMAGE_MARKER, "image")
