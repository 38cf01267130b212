"""Where the samples of a recipe are."""

from __future__ import annotations

from pathlib import Path

from vltrain.config.schema import OWN, Config
from vltrain.errors import InputError


def samples_folder(config: Config) -> Path:
    """Where the samples of a recipe are: prepared ones, or those of its own. Raises InputError for a mixture, which has
    several such folders (`vltrain.config.mixture.sets_of`)."""
    data = config.data
    if data.mixture:
        raise InputError(f"data.mixture: found {', '.join(data.mixture)}, expected one set of samples")
    if data.source != OWN:
        return Path(data.root) / "samples"
    place = Path(str(data.input))
    return place if place.is_dir() else place.parent


def samples_file(config: Config, split: str) -> Path:
    """Where a split's samples are, for whoever has had them made and checked: while a run goes on, its raw data may
    become the next one's.

    Raises: InputError for a split of own samples that the recipe does not say the file of.
    """
    if Path(split).name != split:
        raise InputError(
            f"split {split!r}: expected a plain name, such as 'val', which is a file below {samples_folder(config)}"
        )
    data, folder = config.data, samples_folder(config)
    if data.source != OWN:
        return folder / f"{split}.jsonl"
    if split in data.options:
        return Path(str(data.options[split]))
    place = Path(str(data.input))
    if not place.exists():
        raise InputError(f"data.input: {place}: no such file or folder, expected own samples (data.source = samples)")
    if place.is_dir():
        return place / f"{split}.jsonl"
    if split != data.train_split:
        ways = (
            f"say where they are: data.options.{split} FILE; or name a folder of SPLIT.jsonl; or train without "
            "evaluation (eval.scorer: null)"
        )
        raise InputError(
            f"data.input: {place} is the file of '{data.train_split}', and there are no samples of '{split}'; {ways}"
        )
    return place
