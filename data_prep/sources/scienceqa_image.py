"""The image questions of ScienceQA as InstructBLIP is asked them, from the same official files as `scienceqa`.

    "Context: hint lecture Question: ... Options: (a) x (b) y Answer:" -> "(a) x"

6,218 train, 2,097 val and 2,017 test questions have an image; the others are left out. No explanation is learned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.reading import is_there
from data_prep.sources.options import choose, resolve_options
from data_prep.sources.prompts import check_template, lettered, plain
from data_prep.sources.raw import RawSample, ids_of, image_name
from data_prep.sources.scienceqa import checked, require_dropped
from vltrain.errors import InputError
from vltrain.files.strict_json import read_object
from vltrain.schema import IMAGE_MARKER, Sample, Turn, escape_markers

PROMPT = "Context: {context} Question: {question} Options: {options} Answer:"


def read(input: Path | None, options: Mapping[str, Any]) -> Iterator[RawSample]:
    """Reads all splits.

    Args:
        input: the folder with problems.json, pid_splits.json and images/{split}/{pid}/image.png.
        options: `prompt` with the places {context} (hint and lecture; "N/A" where there is neither), {question} and
            {options}; `missing_images`: `error`, or `drop` to leave such questions out, each one printed.

    Raises:
        InputError: a missing file or field, an answer that is none of the choices: named with file, pid and key.
    """
    resolved = resolve_options("scienceqa_image", options, {"prompt": PROMPT, "missing_images": "error"})
    check_template("scienceqa_image", "prompt", resolved["prompt"], ("context", "question", "options"))
    choose("scienceqa_image", "missing_images", resolved["missing_images"], ("error", "drop"))
    if input is None:
        raise InputError(
            "source 'scienceqa_image' needs --input, the folder with problems.json, pid_splits.json and images/"
        )
    problems, splits = read_object(input / "problems.json"), read_object(input / "pid_splits.json")
    for split in ("train", "val", "test"):
        for pid in ids_of(splits, split, str(input / "pid_splits.json")):
            if pid not in problems:
                raise InputError(
                    f"{input / 'pid_splits.json'}: split '{split}' names problem '{pid}', which problems.json lacks"
                )
            where = f"{input / 'problems.json'}: problem '{pid}'"
            problem = checked(problems[pid], where)
            if not problem.get("image"):
                continue
            image = input / "images" / split / pid / image_name(problem, "image", where)
            if not is_there(image):
                require_dropped(resolved["missing_images"], image, where)
                print(f"dropped: problem '{pid}', no image {image}")
                continue
            yield _sample(pid, split, problem, image, resolved["prompt"])


def _sample(pid: str, split: str, problem: dict[str, Any], image: Path, template: str) -> RawSample:
    candidates = lettered(problem["choices"])
    context = " ".join(text for text in (problem["hint"].strip(), problem["lecture"].strip()) if text) or "N/A"
    said: dict[str, str] = {
        "context": plain(context),
        "question": plain(problem["question"]),
        "options": " ".join(candidates),
    }
    prompt = template.format(**{place: escape_markers(text) for place, text in said.items()})
    right: int = problem["answer"]
    metadata = {name: problem[name] for name in ("choices", "answer", "subject", "hint", "grade")}
    if problem.get("skill"):
        metadata["skill"] = problem["skill"]
    sample = Sample(
        id=pid,
        turns=(
            Turn(role="user", text=f"{IMAGE_MARKER}\n{prompt}"),
            Turn(role="assistant", text=escape_markers(candidates[right])),
        ),
        images=(f"{split}/{pid}/{image.name}",),
        metadata={**metadata, "candidates": candidates},
    )
    return RawSample(split=split, sample=sample, image_sources=(image,))
