"""`vltrain check data FOLDER`: prepared samples and packs, every file read anew and compared with the digests that
stand beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vltrain.data.origin import MADE_FROM, PREPARED, SAMPLES, SAMPLES_FILE, changes_since, read_made_from, read_prepared
from vltrain.data.remote.blocks import BLOCKS, misfits
from vltrain.data.shards import MANIFEST
from vltrain.data.stream.mixed import open_packed
from vltrain.errors import InputError
from vltrain.receipts.verify import Proof


def check_data(folder: Path | str) -> Proof:
    """What was found in a `data.root`, a folder of prepared samples or one of packs, or at an address of packs.

    Raw data that is not where it was is told and not compared. Raises InputError if there is nothing to check.
    """
    if isinstance(folder, str):
        return _check_address(folder)
    samples = next((place for place in (folder, folder / "samples") if (place / PREPARED).is_file()), None)
    packs = (
        [folder]
        if (folder / MANIFEST).is_file()
        else sorted(path.parent for path in folder.glob(f"packed/*/{MANIFEST}"))
    )
    if samples is None and not packs:
        raise InputError(
            f"{folder}: found neither prepared samples ({PREPARED}) nor packs ({MANIFEST}), expected a "
            "data.root, or a folder of one of them"
        )
    proof = Proof()
    if samples is not None:
        _check(proof, samples, _samples_changes)
    for one in packs:
        _check(proof, one, _packs_changes)
    return proof


def _check(proof: Proof, folder: Path, changes: Callable[[Path], tuple[list[str], list[str]]]) -> None:
    try:
        changed, facts = changes(folder)
    except InputError as error:
        proof.failures.append(str(error))
        return
    proof.failures += [f"{folder}: {line}" for line in changed]
    if not changed:
        proof.facts += [f"{folder}: {line}" for line in facts]


def _samples_changes(folder: Path) -> tuple[list[str], list[str]]:
    from data_prep.reading import ELSEWHERE

    made = read_prepared(folder)
    assert made is not None
    if made.files is None:
        return [], ["samples of an older version, which keep no digests: nothing is compared"]
    roots: dict[str, Path | None] = {SAMPLES: folder, ELSEWHERE: Path("/")}
    gone = []
    for place, was in sorted(made.places.items()):
        if Path(was).exists():
            roots[place] = Path(was)
        else:
            gone.append(f"raw data {was} ({place}) no longer exists: not compared")
    return changes_since(folder, made, roots, verify=True), [
        f"samples and images as they were prepared from {made.name()}",
        *gone,
    ]


def _check_address(address: str) -> Proof:
    """Packs at an address: every file that the manifest lists."""
    dataset, proof = open_packed(address, verify=False), Proof()
    damaged, manifest = dataset.damaged(), dataset.manifest
    proof.failures += damaged
    if not damaged:
        proof.facts.append(
            f"{address}: {manifest.num_packs} packs, {manifest.num_samples} samples and {manifest.num_images} images, "
            "every byte as it was packed; what they were packed from is not compared"
        )
    return proof


def _packs_changes(folder: Path) -> tuple[list[str], list[str]]:
    dataset = open_packed(folder, verify=True)
    if damaged := dataset.damaged():
        return damaged, []
    manifest = dataset.manifest
    shards = [file.name for file in manifest.files if file.name.startswith(("packs-", "images-"))]
    if (folder / BLOCKS).is_file() and (wrong := misfits(folder, shards, manifest.checksum)):
        return wrong, []
    facts = [
        f"{manifest.num_packs} packs, {manifest.num_samples} samples and {manifest.num_images} images, every "
        "byte as it was packed"
    ]
    made = read_made_from(folder)
    if made is None:
        return [], [*facts, f"no {MADE_FROM}: of an older version"]
    samples = folder.absolute().parent.parent / "samples" / made.name
    if not samples.is_file():
        return [], [*facts, f"their samples, {made.name}, are not beside them: not compared"]
    return changes_since(folder, made, {SAMPLES_FILE: samples, SAMPLES: samples.parent}, verify=True), [
        *facts,
        f"packed from {samples} as it is",
    ]
