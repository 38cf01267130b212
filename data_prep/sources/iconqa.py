"""IconQA (Lu et al., 2021, https://arxiv.org/abs/2110.13214): questions about icon images, with text, image or no
choices.

Official layout, in the given folder or in its `iconqa_data`:

    iconqa/{train,val,test}/{choose_txt,choose_img,fill_in_blank}/PID/   data.json, image.png, and choice_N.png of
                                                                         choose_img
    problems.json     {PID: what data.json says}; where a folder has no data.json
    pid_splits.json   {train: [PID, ...], choose_txt_train: [...], ...}; where the folders have no split level
    pid2skills.json   {PID: [skill, ...]}; for accuracy by skill

Levels above the question types may be missing. Without a split level and without pid_splits.json, `val_fraction` and
`test_fraction` of the questions are held out by image (`data_prep.sources.splits`).

choose_txt: the choices are listed as `(a) x (b) y`, and the answer is the right one, letter and text. choose_img (which
the paper's code leaves out): each choice is an image of its own and stands behind its letter, and the answer is the
letter, `(b)`. A model that takes one image only is trained on the other two types (option `ques_types`). fill_in_blank:
the answer is the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.reading import is_there
from data_prep.sources.options import choose, resolve_options
from data_prep.sources.prompts import MAX_CHOICES, check_template, lettered, plain
from data_prep.sources.raw import RawSample, ids_of
from data_prep.sources.splits import FRACTIONS, check_fractions, drawn
from vltrain.errors import InputError, nearest
from vltrain.files.strict_json import field, read_json, read_object, shown, texts
from vltrain.schema import IMAGE_MARKER, Sample, Turn, escape_markers

SPLITS = ("train", "val", "test")
TYPES = ("choose_txt", "choose_img", "fill_in_blank")
DEFAULTS = {
    "ques_types": TYPES,
    "prompt": "Question: {question} Options: {options}. Short answer:",
    "open_prompt": "Question: {question} Short answer:",
    "val_fraction": 0.1,
    "test_fraction": 0.1,
}


def read(input: Path | None, options: Mapping[str, Any]) -> Iterator[RawSample]:
    """Reads all splits.

    Args:
        input: see the module.
        options: `ques_types`, a list (all three); `prompt` of questions with choices, with places {question} and
            {options}; `open_prompt` of those without, with {question}; `val_fraction` (0.1) and `test_fraction` (0.1),
            each in [0, 1) and together less than 1, see the module.

    Raises:
        InputError: nothing there, an unknown question type, missing or malformed fields, no choices, an answer that is
        none of them:
            named with file, pid and key.
    """
    resolved = _resolved(options)
    if input is None:
        raise InputError("source 'iconqa' needs --input, the folder of the official files")
    root, base = _find_root(input)
    has_splits = any([is_there(root / split) for split in SPLITS])  # noqa: C419 (each is noted)
    problems = read_object(base / "problems.json") if is_there(base / "problems.json") else {}
    skills = read_object(base / "pid2skills.json") if is_there(base / "pid2skills.json") else {}
    splits = None if has_splits or not is_there(base / "pid_splits.json") else _splits_by_pid(base / "pid_splits.json")
    held_out = [name for name in ("val_fraction", "test_fraction") if name in options]
    if held_out and (has_splits or splits is not None):
        raise InputError(
            f"source 'iconqa', option '{held_out[0]}': has no effect: {root} has splits of its own; leave it out"
        )
    questions = partial(_questions, root, base, has_splits, splits, problems, skills, resolved)
    yield from questions() if has_splits or splits is not None else drawn("iconqa", questions, resolved, options)


def _questions(
    root: Path,
    base: Path,
    has_splits: bool,
    splits: Mapping[str, str] | None,
    problems: Mapping[str, Any],
    skills: Any,
    resolved: Mapping[str, Any],
) -> Iterator[RawSample]:
    """All questions; in `train` where neither folders nor `splits` tell the split."""
    for folder, split in _question_folders(root, has_splits, resolved["ques_types"]):
        where = f"{folder / 'data.json'}: problem '{folder.name}'"
        if is_there(folder / "data.json"):
            record = read_json(folder / "data.json")
        elif folder.name in problems:
            record, where = problems[folder.name], f"{base / 'problems.json'}: problem '{folder.name}'"
        else:
            raise InputError(f"{where}: no such file, and no problems.json in {base} that tells of it")
        if splits is not None and folder.name not in splits:
            raise InputError(f"{base / 'pid_splits.json'}: problem '{folder.name}' ({folder}) is in none of its splits")
        split = split or (splits[folder.name] if splits is not None else "train")
        yield _sample(
            _checked(record, folder, where), folder, root, split, _skills(skills, folder.name, base), resolved
        )


def _resolved(options: Mapping[str, Any]) -> dict[str, Any]:
    resolved = resolve_options("iconqa", options, DEFAULTS, FRACTIONS)
    for name in resolved["ques_types"]:
        choose("iconqa", "ques_types", name, TYPES)
    check_template("iconqa", "prompt", resolved["prompt"], ("question", "options"))
    check_template("iconqa", "open_prompt", resolved["open_prompt"], ("question",))
    check_fractions("iconqa", resolved)
    return resolved


def _find_root(input: Path) -> tuple[Path, Path]:
    """The folder that holds splits or question types, and the one that holds the JSON files."""
    for base in (input, input / "iconqa_data"):
        for root in (base, base / "iconqa"):
            if any([is_there(root / name) and (root / name).is_dir() for name in (*SPLITS, *TYPES)]):  # noqa: C419
                lists = ("problems", "pid_splits", "pid2skills")
                in_base = base != root and any([is_there(base / f"{name}.json") for name in lists])  # noqa: C419
                return root, base if in_base else root
    raise InputError(
        f"{input}: found neither {', '.join(SPLITS)} nor {', '.join(TYPES)} in it; expected "
        "SPLIT/QUESTION_TYPE/PID/data.json"
    )


def _question_folders(root: Path, has_splits: bool, wanted: tuple[str, ...]) -> Iterator[tuple[Path, str | None]]:
    """(folder of a question, its split if the folders tell it), pids in numeric order."""
    for split in SPLITS if has_splits else (None,):
        parent = root / split if split else root
        if not parent.is_dir():
            continue
        if has_splits:
            for entry in sorted(parent.iterdir()):
                if entry.is_dir() and entry.name not in TYPES:
                    raise InputError(f"{entry}: unknown question type '{entry.name}', {nearest(entry.name, TYPES)}")
        for ques_type in (name for name in TYPES if name in wanted and is_there(parent / name)):
            folders = (entry for entry in (parent / ques_type).iterdir() if entry.is_dir())
            yield from (
                (folder, split) for folder in sorted(folders, key=lambda folder: (len(folder.name), folder.name))
            )


def _splits_by_pid(path: Path) -> dict[str, str]:
    """{pid: split} from lists that are called SPLIT or QUESTION_TYPE_SPLIT; others (trainval, minitrain, ...) repeat
    what those hold."""
    named = {name: (name, *(f"{ques_type}_{name}" for ques_type in TYPES)) for name in SPLITS}
    lists = read_object(path)
    found: dict[str, str] = {}
    for split, names in named.items():
        for name in (name for name in names if name in lists):
            for pid in ids_of(lists, name, str(path)):
                if found.setdefault(pid, split) != split:
                    raise InputError(f"{path}: problem '{pid}' is in both {found[pid]} and {split}")
    return found


def _skills(skills: dict[str, Any], pid: str, base: Path) -> list[str]:
    """The question's skills; none where there is no pid2skills.json."""
    return texts(skills, pid, str(base / "pid2skills.json")) if skills else []


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """A question whose fields have been looked at. `answer`: the number of a choice, or of fill_in_blank the text."""

    ques_type: str
    question: str
    choices: tuple[str, ...]
    answer: int | str
    grade: str
    label: str


def _checked(record: Any, folder: Path, where: str) -> _Problem:
    ques_type = field(record, "ques_type", str, where)
    if ques_type not in TYPES:
        raise InputError(f"{where}: ques_type: unknown '{ques_type}', {nearest(ques_type, TYPES)}")
    if ques_type != folder.parent.name:
        raise InputError(f"{where}: ques_type: found '{ques_type}' in a folder of '{folder.parent.name}'")
    texts = {key: field(record, key, str, where) for key in ("question", "grade", "label")}
    if ques_type == "fill_in_blank":
        return _Problem(ques_type=ques_type, choices=(), answer=field(record, "answer", str, where), **texts)
    choices = field(record, "choices", list, where)
    if not 2 <= len(choices) <= MAX_CHOICES:
        raise InputError(f"{where}: choices: found {len(choices)}, expected 2 to {MAX_CHOICES}")
    for number, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            raise InputError(f"{where}: choices[{number}]: found {shown(choice)}, expected a text that is not empty")
    answer = field(record, "answer", int, where)
    if not 0 <= answer < len(choices):
        raise InputError(f"{where}: answer: found {answer}, expected 0 to {len(choices) - 1}, one of the choices")
    return _Problem(ques_type=ques_type, choices=tuple(choices), answer=answer, **texts)


def _sample(
    problem: _Problem, folder: Path, root: Path, split: str, skills: list[str], resolved: Mapping[str, Any]
) -> RawSample:
    names, candidates = ["image.png"], []
    question = escape_markers(plain(problem.question))
    if problem.ques_type == "fill_in_blank":
        prompt, answer = resolved["open_prompt"].format(question=question), plain(str(problem.answer))
    else:
        assert isinstance(problem.answer, int)
        candidates = lettered(problem.choices)
        listed = [escape_markers(candidate) for candidate in candidates]
        if problem.ques_type == "choose_img":
            names += problem.choices
            candidates = lettered([""] * len(problem.choices))
            listed = [f"{letter} {IMAGE_MARKER}" for letter in candidates]
        prompt, answer = (
            resolved["prompt"].format(question=question, options=" ".join(listed)),
            candidates[problem.answer],
        )
    sample = Sample(
        id=folder.name,
        turns=(
            Turn(role="user", text=f"{IMAGE_MARKER}\n{prompt}"),
            Turn(role="assistant", text=escape_markers(answer)),
        ),
        images=tuple(str(folder.relative_to(root) / name) for name in names),
        metadata={
            "question_type": problem.ques_type,
            "choices": list(problem.choices),
            "answer": problem.answer,
            "candidates": candidates,
            "grade": problem.grade,
            "label": problem.label,
            "skills": skills,
        },  # fmt: skip
    )
    return RawSample(split=split, sample=sample, image_sources=tuple(folder / name for name in names))
