"""Several sets of packs as one: trained on together, told apart by their samples' names.

    manifest.json   as of packs, of all sets together, without files of its own; `mixture`: the sets with their
                    checksums and shares
    sets.json       where each set's packs are, seen from this folder; not part of any checksum, so folders may move

Packs are numbered through, and so are images; a sample is SET/ID. So whatever reads packs by their numbers (plan,
loader, receipts, blame) reads a mixture as it reads one set. Trade-off: the sets' indices are joined in memory, 24
bytes a pack.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vltrain.config.mixture import of_set
from vltrain.data.flat.index import INDEX_SCHEMA, Index
from vltrain.data.remote.address import is_address
from vltrain.data.remote.cache import CacheSettings
from vltrain.data.shards import MANIFEST, Manifest, PackedDataset, read_manifest
from vltrain.data.stream.mixing import Mixing, shares_of, starts_of
from vltrain.errors import InputError
from vltrain.files.atomic import write_json, write_whole
from vltrain.files.strict_json import read_object
from vltrain.schema import PackedRow

SETS = "sets.json"
_SAME = ("tokenizer_fingerprint", "template", "visual_tokens", "pack_length", "format_version")
_SUMS = ("num_packs", "num_samples", "num_images", "num_tokens", "num_label_tokens", "over_long")


class MixedPacks(PackedDataset):
    """Sets of packs, opened.

    Args:
        folder: where it says of itself what it is; need not be there yet, see `write`.
        sets: by name, in order.
        mixing: how they are mixed.
        by: what the recipe says of that, plain JSON.

    Raises: InputError for packs of different models or lengths.
    """

    def __init__(self, folder: Path, sets: Mapping[str, PackedDataset], mixing: Mixing, by: Mapping[str, Any]) -> None:
        self.folder, self.place, self.sets, self.mixing = folder, str(folder), dict(sets), mixing
        self._parts = list(self.sets.values())
        self._image_starts = starts_of([one.manifest.num_images for one in self._parts])
        self._by = dict(by)
        self.manifest = self._manifest()

    def _manifest(self) -> Manifest:
        first, *others = (one.manifest for one in self._parts)
        for name, other in zip(list(self.sets)[1:], others, strict=True):
            for field in _SAME:
                if (found := getattr(other, field)) != (expected := getattr(first, field)):
                    raise InputError(
                        f"data.mixture: {name}: its packs have {field} {found!r}, those of {next(iter(self.sets))} "
                        f"{expected!r}; pack all sets for one model"
                    )
        sums = {name: sum(getattr(one.manifest, name) for one in self._parts) for name in _SUMS}
        bounds = [one.manifest.max_images for one in self._parts]
        known = [one for one in bounds if one is not None]
        most = max(known) if len(known) == len(bounds) else None
        checksums = {name: one.manifest.checksum for name, one in self.sets.items()}
        mixture = {"packs": checksums, **self.mixing.to_json(), **self._by}
        return replace(first, **sums, max_images=most, files=(), lost=None, mixture=mixture)

    def at(self, folder: Path) -> MixedPacks:
        """The same, in a folder."""
        self.folder, self.place = folder, str(folder)
        return self

    def write(self) -> None:
        """Writes both files, where they are not there. For one process; the folder is named by what it says."""
        if self._is_written():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / SETS, {name: self._place_of(one) for name, one in self.sets.items()})
        write_whole(self.folder / MANIFEST, self.manifest.dumps())

    def _is_written(self) -> bool:
        try:
            return open_packed(self.folder, verify=False, cache=self.cache).manifest.checksum == self.manifest.checksum
        except InputError:
            return False

    def _place_of(self, one: PackedDataset) -> str:
        """Where packs are, seen from this folder where they are beside it."""
        if one.is_remote:
            return one.place
        root, packs = self.folder.absolute().parent.parent, one.folder.absolute()
        return os.path.relpath(packs, self.folder.absolute()) if packs.is_relative_to(root) else str(packs)

    def __len__(self) -> int:
        return self.manifest.num_packs

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(address for one in self._parts for address in one.addresses)

    @property
    def cache(self) -> CacheSettings | None:
        return next((one.cache for one in self._parts if one.is_remote), None)

    def damaged(self) -> list[str]:
        found = list[str]()
        for name, one in self.sets.items():
            with of_set(name):
                found += one.damaged()
        return found

    def keep(self, number: int) -> int:
        place, own = self._find(number)
        return self._parts[place].keep(own)

    @functools.cached_property
    def index(self) -> Index:
        parts = [one.index for one in self._parts]
        joined = {name: np.concatenate([getattr(one, name) for one in parts]) for name in INDEX_SCHEMA.names}
        return Index(**joined, mixed=self.mixing)

    def _find(self, number: int) -> tuple[int, int]:
        """The number of the set, and the pack's number in it."""
        if not 0 <= number < len(self):
            raise IndexError(f"pack {number} of {len(self)}")
        place = int(self.mixing.set_of(np.asarray(number)))
        return place, number - self.mixing.starts[place]

    def row(self, number: int) -> PackedRow:
        place, own = self._find(number)
        with of_set(self.mixing.names[place]):
            row = self._parts[place].row(own)
        return replace(
            row,
            image_ids=row.image_ids + self._image_starts[place],
            sample_ids=tuple(f"{self.mixing.names[place]}/{name}" for name in row.sample_ids),
        )

    def image_tokens(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sums = np.zeros((2, len(numbers)), np.int64)
        sets = self.mixing.set_of(numbers)
        for place, part in enumerate(self._parts):
            mine = sets == place
            with of_set(self.mixing.names[place]):
                sums[:, mine] = part.image_tokens(numbers[mine] - self.mixing.starts[place])
        return sums[0], sums[1]

    def sample_ids(self, number: int) -> tuple[str, ...]:
        place, own = self._find(number)
        with of_set(self.mixing.names[place]):
            names = self._parts[place].sample_ids(own)
        return tuple(f"{self.mixing.names[place]}/{name}" for name in names)

    def image(self, image_id: int) -> bytes:
        place = int(np.searchsorted(self._image_starts, image_id, side="right")) - 1
        with of_set(self.mixing.names[place]):
            return self._parts[place].image(image_id - self._image_starts[place])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "index"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def mixed(
    root: Path, sets: Mapping[str, PackedDataset], by: str, weights: Mapping[str, float], ends: str
) -> MixedPacks:
    """Sets mixed as a recipe says.

    Args:
        root: the mixture's folder goes below it.
        by: what weights are of: tokens, samples or passes.
        ends: what happens when a set ends: repeat or stop.

    Raises: InputError for sets without packs, and for packs of different models or lengths.
    """
    told = {name: one.manifest for name, one in sets.items()}
    for name, manifest in told.items():
        if manifest.num_packs == 0:
            raise InputError(f"data.mixture: {name}: {sets[name].place} has no packs to train on")
    per_pack = {
        "tokens": [one.num_tokens / one.num_packs for one in told.values()],
        "samples": [one.num_samples / one.num_packs for one in told.values()],
        "passes": [1 / one.num_packs for one in told.values()],
    }[by]
    given = [weights[name] for name in sets]
    mixing = Mixing(
        names=tuple(sets),
        num_packs=tuple(one.num_packs for one in told.values()),
        shares=shares_of(given, per_pack),
        passes=tuple(given) if by == "passes" else None,
        stops=ends == "stop",
    )
    unnamed = MixedPacks(root, sets, mixing, {"by": by, "weights": dict(zip(sets, given, strict=True))})
    return unnamed.at(root / "mixed" / unnamed.manifest.checksum[:12])


def open_packed(place: Path | str, verify: bool = True, cache: CacheSettings | None = None) -> PackedDataset:
    """Opens packs, of one set or a mixture's. Arguments and errors: see `PackedDataset`."""
    folder = Path(place)
    if is_address(place) or not (folder / SETS).is_file():
        return PackedDataset(place, verify, cache)
    manifest = read_manifest(folder)
    said, places = manifest.mixture, read_object(folder / SETS, "where the packs of a mixture's sets are")
    if said is None or places.keys() != said["packs"].keys():
        raise InputError(
            f"{folder / SETS}: names other sets than {MANIFEST} beside it; train the mixture's recipe again"
        )
    sets = dict[str, PackedDataset]()
    for name in said["packs"]:
        with of_set(name):
            sets[name] = PackedDataset(_place(folder, places[name]), verify, cache)
    for name, one in sets.items():
        if one.manifest.checksum != said["packs"][name]:
            raise InputError(
                f"{one.place}: not the packs of the set {name} that {folder} mixes; name those in {SETS} there"
            )
    mixing = Mixing(
        names=tuple(sets),
        num_packs=tuple(len(one) for one in sets.values()),
        shares=tuple(said["shares"][name] for name in sets),
        passes=tuple(said["passes"]) if "passes" in said else None,
        stops=said["stops"],
    )
    return MixedPacks(folder, sets, mixing, {name: said[name] for name in ("by", "weights")})


def _place(folder: Path, named: Any) -> Path | str:
    if is_address(named):
        return named
    if not isinstance(named, str):
        raise InputError(f"{folder / SETS}: found {named!r}, expected a folder of packs for each set")
    return Path(os.path.normpath(folder / named))
