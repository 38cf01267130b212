"""Flickr30k (Young et al., 2014): 31,783 images with five captions each, from the official files.

    results_20130124.token     NAME.jpg#N<TAB>caption; or
    dataset_flickr30k.json     Karpathy's file (2015), captions and splits: 29,000 train, 1,014 val, 1,000 test
    flickr30k-images/          also flickr30k_images/ or images/

Where both are there, Karpathy's is read. The official files alone have no splits: `val_images` and `test_images` are
then held out by a hash of their names, equal files together; at 1,000 each 29,783 are left, the paper's numbers.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.reading import is_there
from data_prep.sources.options import choose, resolve_options
from data_prep.sources.prompts import check_template, plain
from data_prep.sources.raw import RawSample, image_name
from vltrain.config.ranges import MOST_STEPS, Range
from vltrain.data.report.same import same_images
from vltrain.errors import InputError
from vltrain.files.strict_json import field, read_json, read_text
from vltrain.schema import IMAGE_MARKER, Sample, Turn, escape_markers

TOKEN_FILE, SPLIT_FILE = "results_20130124.token", "dataset_flickr30k.json"
IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images", "images")
SPLITS = ("train", "val", "test")


def read(input: Path | None, options: Mapping[str, Any]) -> Iterator[RawSample]:
    """Reads all splits: of train a sample per caption, of val and test a sample per image, with all its captions as
    references.

    Args:
        input: the folder of the files above.
        options: `prompt` ("A short image description:"); `train_captions`, `all` or `first`; `val_images` (1000) and
            `test_images` (1000), see the module.

    Raises:
        InputError: nothing there, malformed lines or fields, an unknown split: named with file, line or image, and key.
    """
    defaults = {
        "prompt": "A short image description:",
        "train_captions": "all",
        "val_images": 1000,
        "test_images": 1000,
    }
    resolved = resolve_options(
        "flickr30k", options, defaults, dict.fromkeys(("val_images", "test_images"), Range(0, MOST_STEPS))
    )
    check_template("flickr30k", "prompt", resolved["prompt"], ())
    choose("flickr30k", "train_captions", resolved["train_captions"], ("all", "first"))
    if input is None:
        raise InputError(f"source 'flickr30k' needs --input, the folder of {SPLIT_FILE} or {TOKEN_FILE} and the images")
    folder = next((input / name for name in IMAGE_FOLDERS if is_there(input / name) and (input / name).is_dir()), None)
    if folder is None:
        raise InputError(f"{input}: found no folder of images, expected one of {', '.join(IMAGE_FOLDERS)}")
    if is_there(input / SPLIT_FILE):
        for name in ("val_images", "test_images"):
            if name in options:
                raise InputError(
                    f"source 'flickr30k', option '{name}': has no effect: {SPLIT_FILE} has splits of its own; "
                    "leave it out"
                )
        described = _read_karpathy(input / SPLIT_FILE)
    else:
        captions = _read_tokens(input / TOKEN_FILE)
        described = _hold_out(captions, resolved["val_images"], resolved["test_images"], folder, input / TOKEN_FILE)
    for name, split, captions_of_image in described:
        yield from _samples(name, split, captions_of_image, folder, resolved)


def _samples(
    name: str, split: str, captions: list[str], folder: Path, resolved: Mapping[str, Any]
) -> Iterator[RawSample]:
    shown = captions if split == "train" and resolved["train_captions"] == "all" else captions[:1]
    for number, caption in enumerate(shown):
        sample = Sample(
            id=name if split != "train" else f"{name}#{number}",
            turns=(
                Turn(role="user", text=f"{IMAGE_MARKER}\n{resolved['prompt']}"),
                Turn(role="assistant", text=escape_markers(caption)),
            ),
            images=(name,),
            metadata={"answer": caption, "captions": captions},
        )
        yield RawSample(split=split, sample=sample, image_sources=(folder / name,))


def _read_karpathy(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(file name, split, captions) of each image."""
    for number, record in enumerate(field(read_json(path), "images", list, str(path))):
        where = f"{path}: image {number}"
        name = image_name(record, "filename", where)
        where = f"{where} ('{name}')"
        split = field(record, "split", str, where)
        if split not in SPLITS:
            raise InputError(f"{where}: split: found '{split}', expected one of {', '.join(SPLITS)}")
        captions = [plain(field(sentence, "raw", str, where)) for sentence in field(record, "sentences", list, where)]
        if not captions:
            raise InputError(f"{where}: sentences: found none, expected a caption at least")
        yield name, split, captions


def _read_tokens(path: Path) -> dict[str, list[str]]:
    """{file name: captions} in the file's order."""
    lines = read_text(path, f"it, or {SPLIT_FILE} beside it").split("\n")
    captions: dict[str, list[str]] = {}
    keys: set[str] = set()
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line and number == len(lines):
            break
        key, tab, caption = line.partition("\t")
        name, mark, place = key.partition("#")
        if not (tab and mark and name and place.isdigit() and caption.strip()):
            raise InputError(f"{path}:{number}: found {line!r:.80}, expected NAME#NUMBER<TAB>caption")
        if key in keys:
            raise InputError(f"{path}:{number}: a second caption {key!r:.80}, expected each number once")
        keys.add(key)
        captions.setdefault(name, []).append(plain(caption))
    return captions


def _hold_out(
    captions: dict[str, list[str]], num_val: int, num_test: int, folder: Path, path: Path
) -> Iterator[tuple[str, str, list[str]]]:  # fmt: skip
    if num_val < 0 or num_test < 0 or num_val + num_test >= len(captions):
        found = f"val_images {num_val} and test_images {num_test} of {len(captions)} images"
        raise InputError(f"{path}: {found}; expected 0 or more, and some left to train on")
    names = list(captions)
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for name, first in zip(names, same_images([folder / name for name in names]), strict=True):
        alike[names[first]].append(name)
    splits: dict[str, str] = {}
    wanted = {"val": num_val, "test": num_test}
    for first in sorted(alike, key=lambda name: hashlib.sha256(name.encode()).digest()):
        split = next((split for split, left in wanted.items() if len(alike[first]) <= left), "train")
        splits.update(dict.fromkeys(alike[first], split))
        wanted[split] = wanted.get(split, 0) - len(alike[first])
    if wanted["val"] > 0 or wanted["test"] > 0 or "train" not in splits.values():
        found = (
            f"val_images {num_val} and test_images {num_test} of {len(captions)} images, of which {len(alike)} differ"
        )
        raise InputError(
            f"{path}: {found}; equal images go into one split: expected fewer held out, or images that differ"
        )
    for name, captions_of_image in captions.items():
        yield name, splits[name], captions_of_image
