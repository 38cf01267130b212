"""A small data set of questions on drawn images, written in each format that the `datasets` library reads."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NUM_ROWS, NUM_IMAGES = 24, 9


def picture(number: int, size: tuple[int, int] = (12, 8)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (number * 25 % 256, 200, number * 7 % 256)).save(stream, "PNG")
    return stream.getvalue()


def rows() -> list[dict[str, Any]]:
    """Question, answer and image bytes of each row."""
    return [
        {"question": f"what is {number}? <image>", "answer": f"it is ü{number}", "image": picture(number % NUM_IMAGES)}
        for number in range(NUM_ROWS)
    ]


def as_parquet(folder: Path, files: int = 3, split: str = "train", made: list[dict[str, Any]] | None = None) -> Path:
    """As the Hub has them: images in a struct of bytes and path, several files, small row groups."""
    folder.mkdir(parents=True, exist_ok=True)
    made = rows() if made is None else made
    step = -(-len(made) // files)
    for number in range(files):
        part = [{**row, "image": {"bytes": row["image"], "path": f"{number}.png"}} if "image" in row else row
                for row in made[number * step : (number + 1) * step]]  # fmt: skip
        name = f"{split}-{number:05d}-of-{files:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(part), folder / name, row_group_size=5)
    return folder


def _images_beside(folder: Path, below: str) -> list[dict[str, Any]]:
    (folder / below).mkdir(parents=True)
    for number in range(NUM_IMAGES):
        (folder / below / f"{number}.png").write_bytes(picture(number))
    return [{**row, "image": f"{below}/{number % NUM_IMAGES}.png"} for number, row in enumerate(rows())]


def as_json_lines(folder: Path) -> Path:
    made = _images_beside(folder, "pictures")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder / "rows.jsonl"


def as_json_list(folder: Path) -> Path:
    made = _images_beside(folder, "pictures")
    (folder / "rows.json").write_text(json.dumps(made))
    return folder / "rows.json"


def as_csv(folder: Path) -> Path:
    made = _images_beside(folder, "pictures")
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer", "image"])
        writer.writeheader()
        writer.writerows(made)
    return folder / "rows.csv"


def as_imagefolder(folder: Path) -> Path:
    """An image for each row: the library wants them so."""
    (folder / "train").mkdir(parents=True)
    lines = []
    for number, row in enumerate(rows()):
        (folder / "train" / f"{number:02d}.png").write_bytes(row.pop("image"))
        lines.append(json.dumps({"file_name": f"{number:02d}.png", **row}) + "\n")
    (folder / "train" / "metadata.jsonl").write_text("".join(lines))
    return folder


def as_webdataset(folder: Path, files: int = 2) -> Path:
    """Members KEY.png and KEY.json of each row."""
    folder.mkdir()
    made = rows()
    for file in range(files):
        with tarfile.open(folder / f"train-{file:04d}.tar", "w") as tar:
            for number in range(file * len(made) // files, (file + 1) * len(made) // files):
                row = dict(made[number])
                image = row.pop("image")
                for suffix, data in (("png", image), ("json", json.dumps(row).encode())):
                    member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def as_arrow(folder: Path) -> Path:
    folder.mkdir()
    table = pa.Table.from_pylist(rows())
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return folder / "rows.arrow"
