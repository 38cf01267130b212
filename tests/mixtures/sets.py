"""A mixture of two small sets of packs, on the disk."""

from pathlib import Path

from tests.support.tiny import make_segments, write_packs
from vltrain.data.shards import PackedDataset
from vltrain.data.stream.mixed import MixedPacks, mixed

WEIGHTS = {"red": 2.0, "blue": 1.0}


def make_sets(folder: Path, **num_packs: int) -> dict[str, PackedDataset]:
    """By name, packs of so many; ids are the same in all of them, and no text is."""
    return {
        name: PackedDataset(write_packs(folder / name / "packed" / "train", make_segments(count, seed), seed))
        for seed, (name, count) in enumerate(num_packs.items())
    }


def make_mixture(folder: Path, ends: str = "repeat", by: str = "tokens", **num_packs: int) -> MixedPacks:
    """Written below `folder`, weighted by tokens two to one unless said otherwise."""
    sets = make_sets(folder, **(num_packs or {"red": 9, "blue": 5}))
    found = mixed(folder, sets, by, {name: WEIGHTS.get(name, 1.0) for name in sets}, ends)
    found.write()
    return found
