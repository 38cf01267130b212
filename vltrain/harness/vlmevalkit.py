"""VLMEvalKit's files: its questions (a TSV, images inside or beside it) in, its result file out.

    index  image (base64, several as a list, or another row's index) or image_path  question  [hint]  [A B C D ...]
    [answer]  ...
    -> MODEL_DATASET.tsv, .json or .xlsx: the same columns but image, and `prediction`

That file is what VLMEvalKit's inference leaves behind, and what its `run.py --mode eval` scores: in its working folder,
with PRED_FORMAT set to the format where that is not xlsx. Rows without an image are left out where the file has images,
as VLMEvalKit does.
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import io
import json
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from vltrain.errors import InputError
from vltrain.files.atomic import write_whole
from vltrain.inference.model import Question
from vltrain.schema import IMAGE_MARKER, Turn, escape_markers

FORMATS = ("tsv", "json", "xlsx")
OPTIONS = tuple(string.ascii_uppercase)
LONGEST_REFERENCE = 64  # an `image` of no more characters is the index of a row that has it
FIELDS = ("question", "hint", "options")
CHOICES = (
    "Hint: {hint}\nQuestion: {question}\nOptions:\n{options}Please select the correct answer from the options above. \n"
)
"""VLMEvalKit's own prompt of a row with options; the hint's line is left out where there is none."""
csv.field_size_limit(1 << 31)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the file. `cells`: by column, the image's left out; `images`: files or their bytes."""

    cells: dict[str, str]
    images: tuple[bytes | Path, ...]
    where: str

    def without_images(self) -> Row:
        return replace(self, images=())

    def asked(self, prompt: str | None) -> Question:
        """The question; `prompt`: a text with {question}, {hint} and {options}, None: VLMEvalKit's."""
        options = "".join(f"{name}. {self.cells[name]}\n" for name in OPTIONS if self.cells.get(name))
        values = {"question": self.cells["question"], "hint": self.cells.get("hint", ""), "options": options}
        if prompt is not None:
            text = prompt.format(**values)
        elif options:
            text = CHOICES.format(**values).removeprefix("Hint: \n")
        else:
            text = values["question"]
        return [Turn(role="user", text=f"{IMAGE_MARKER}\n" * len(self.images) + escape_markers(text))], self.images


def require_prompt(prompt: str | None) -> None:
    """Raises InputError for a prompt that is no format of `FIELDS`, or does not ask the question."""
    if prompt is None:
        return
    try:
        named = {name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None}
        prompt.format(**dict.fromkeys(FIELDS, ""))
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise InputError(
            f"--prompt: found {prompt!r} ({error}), expected a text with {', '.join(f'{{{name}}}' for name in FIELDS)}"
        ) from None
    if "question" not in named:
        raise InputError(f"--prompt: found {prompt!r}, which does not ask the question; expected {{question}} in it")


@dataclass(frozen=True, kw_only=True)
class Questions:
    """A file that was looked at as a whole, and is read again row by row: it may be larger than memory.

    images: the folder of the files that `image_path` names; shared: images that several rows show, by the index of the
    row that has each.
    """

    path: Path
    images: Path | None
    shared: dict[str, str]
    num_rows: int

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[Row]:
        """The rows that have an image, or all where none has. Raises InputError for a damaged image."""
        for where, cells in _records(self.path):
            if _is_asked(cells):
                yield Row(
                    cells={name: value for name, value in cells.items() if name != "image"},
                    images=_images_of(cells, self.shared, self.images, where),
                    where=where,
                )


def open_questions(path: Path, images: Path | None) -> Questions:
    """Looks at the whole file, before the first question is asked. `images`: of `Questions`.

    Raises: InputError for a file that is no such table, an index that comes twice, a question that is none, a damaged
    image.
    """
    pointed = _pointed(path, images)
    shared = {cells["index"]: cells.get("image", "") for _, cells in _records(path) if cells["index"] in pointed}
    for index, where in pointed.items():
        if len(shared.get(index, "")) <= LONGEST_REFERENCE:
            raise InputError(
                f"{where}: image is {index!r}, which is neither an image in base64 nor the index of a row that has one"
            )
    num_rows = 0
    for where, cells in _records(path):
        _images_of(cells, shared, images, where)
        num_rows += _is_asked(cells)
    return Questions(path=path, images=images, shared=shared, num_rows=num_rows)


def _is_asked(cells: dict[str, str]) -> bool:
    return bool(cells.get("image") or cells.get("image_path")) or not ({"image", "image_path"} & cells.keys())


def _records(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _lines(path, file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path}: cannot be read as a TSV of VLMEvalKit's ({getattr(error, 'strerror', None) or error})"
        ) from None


def _lines(path: Path, file: TextIO) -> Iterator[tuple[str, dict[str, str]]]:
    rows = csv.reader(file, delimiter="\t", strict=True)
    header = next(rows, [])
    if missing := [name for name in ("index", "question") if name not in header]:
        raise InputError(
            f"{path}: has no column {' and '.join(map(repr, missing))}, expected a TSV of VLMEvalKit's with "
            "index, question and image"
        )
    if len(set(header)) < len(header):
        raise InputError(f"{path}: a column comes twice in {header}")
    for row in rows:
        where = f"{path}, line {rows.line_num}"
        if len(row) != len(header):
            raise InputError(f"{where}: {len(row)} cells, expected {len(header)} as in the first line")
        yield where, dict(zip(header, row, strict=True))


def _pointed(path: Path, images: Path | None) -> dict[str, str]:
    """The indices that rows name in an image's place, each with the first row that does. Raises InputError as
    `open_questions`."""
    seen: set[str] = set()
    pointed: dict[str, str] = {}
    for where, cells in _records(path):
        if cells["index"] in seen:
            raise InputError(f"{where}: index {cells['index']!r} comes twice; answers could not be told apart")
        seen.add(cells["index"])
        if not cells["question"]:
            raise InputError(f"{where}: has no question")
        image = cells.get("image", "")
        if image and len(image) <= LONGEST_REFERENCE and not image.startswith("["):
            pointed.setdefault(image, where)
        if (
            not image
            and cells.get("image_path")
            and images is None
            and not all(Path(one).is_absolute() for one in _listed(cells["image_path"], where))
        ):
            raise InputError(
                f"{where}: image_path {cells['image_path']!r} is relative to a folder that is not named; name "
                "it: --images FOLDER"
            )
    if not seen:
        raise InputError(f"{path}: has no rows")
    return pointed


def _images_of(
    cells: dict[str, str], shared: dict[str, str], images: Path | None, where: str
) -> tuple[bytes | Path, ...]:
    text = cells.get("image", "")
    if text:
        return tuple(_decoded(one, where) for one in _listed(shared.get(text, text), where))
    return tuple((images or Path()) / one for one in _listed(cells.get("image_path", ""), where))


def _listed(text: str, where: str) -> Sequence[str]:
    """A cell's values: one, or those of a list as Python writes it."""
    if not text.startswith("["):
        return [text] if text else []
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        values = None
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise InputError(f"{where}: {text[:40]!r}... is not a list of strings")
    return values


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}: image is not base64 ({error})") from None


def result_file(folder: Path, model: str, dataset: str, form: str) -> Path:
    """Where VLMEvalKit looks for a model's answers. Raises InputError for a format that it does not read, or that needs
    a package which is not there."""
    if form not in FORMATS:
        raise InputError(f"--format: found {form!r}, expected one of {', '.join(FORMATS)}")
    if form == "xlsx":
        try:
            import xlsxwriter  # noqa: F401
        except ImportError:
            raise InputError(
                "--format xlsx: needs a package that is not installed: pip install xlsxwriter; or take tsv, "
                "with PRED_FORMAT=tsv for VLMEvalKit"
            ) from None
    for what, name in (("--name", model), ("the data set", dataset)):
        if not name or "/" in name or name.startswith("."):
            raise InputError(f"{what}: found {name!r}, expected a plain name, as a file's")
    return folder / f"{model}_{dataset}.{form}"


def write_results(path: Path, rows: Sequence[Row], predictions: Sequence[str]) -> None:
    """The result file, whole or not at all, in the format that its name ends with."""
    names = list(dict.fromkeys(name for row in rows for name in row.cells))
    columns: dict[str, list] = {
        name: [row.cells.get(name, "") for row in rows] for name in names if name != "prediction"
    }
    if all(_is_whole(one) for one in columns["index"]):
        columns["index"] = [int(one) for one in columns["index"]]
    columns["prediction"] = list(predictions)
    records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.suffix == ".json":
        content = json.dumps(records, ensure_ascii=False, indent=4).encode()
    elif path.suffix == ".tsv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(columns), delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        content = text.getvalue().encode()
    else:
        content = _sheet(columns)
    write_whole(path, content)


def _sheet(columns: dict[str, list]) -> bytes:
    import xlsxwriter

    stream = io.BytesIO()
    with xlsxwriter.Workbook(
        stream, {"strings_to_formulas": False, "strings_to_urls": False, "in_memory": True}
    ) as book:
        sheet = book.add_worksheet("Sheet1")
        for place, (name, values) in enumerate(columns.items()):
            sheet.write_column(0, place, [name, *values])
    return stream.getvalue()


def _is_whole(text: str) -> bool:
    """As VLMEvalKit tells whether its indices are numbers."""
    try:
        int(text)
    except ValueError:
        return False
    return True
