"""Samples -> packed shards:
`python -m data_prep.pack --samples FILE.jsonl --tokenizer PLACE --visual-tokens V --pack-length T --output DIR`.

Several files are packed together as `--samples SET=FILE SET=FILE`, each sample as SET/ID.

Reads and checks every sample, tokenises them in several processes, assigns them to packs (`vltrain.data.packing`), and
writes the shards with each distinct image once. Tokens and all that is known of a sample wait on disk between the two
passes, so memory does not grow with the samples, only by some hundred bytes per distinct image. A sample that does not
fit into a pack is never cut: it is an error, or with `--over-long drop` left out and listed in `over_long.jsonl`.

In parts (`data_prep.parts`) each part tokenises and decodes its share of the file, which is what takes time; the merge
assigns all samples to packs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.packed_images import PackedImages, Wanted
from data_prep.parallel import usable_cores
from data_prep.parts import (
    Share,
    finished_parts,
    missing_parts,
    new_part,
    read_share,
    remove_parts,
    was_merged,
)
from data_prep.prepare import CHECKED
from data_prep.spool import Spool
from data_prep.steps.pack_command import pack_options, settings_of
from data_prep.steps.sample_files import Given, SampleFiles, read_given
from data_prep.tokens import PackSettings, Tokens, read_tokens, write_tokens
from vltrain.console import Progress, start_logging
from vltrain.data.flat.columns import in_slices
from vltrain.data.origin import (
    MadeFrom,
    read_made_from,
    rendered_digest,
    write_made_from,
)
from vltrain.data.shard_writer import ShardWriter, describe, write_shards
from vltrain.data.shards import FORMAT_VERSION, STOCK_FORMAT, Manifest, PackedDataset, ShardFile
from vltrain.data.text.conversation import find_template
from vltrain.data.text.encoder import SampleEncoder
from vltrain.errors import InputError, exits_cleanly
from vltrain.files.record import read_record

OVER_LONG = "over_long.jsonl"


def pack(
    samples: Given, output: Path, settings: PackSettings, *, workers: int | None = None, rebuild: bool = False
) -> Manifest:
    """Packs a file of samples.

    Args:
        samples: JSONL of `vltrain.schema.Sample`; image paths are relative to its folder. Several by the names of their
            sets are packed together, each sample as SET/ID.
        output: new folder.
        workers: processes; None: all usable cores. The result does not depend on it.
        rebuild: what is there already is replaced once the new packs are whole.

    Returns: the manifest of the written shards.

    Raises:
        InputError: a malformed sample, an id that comes twice, no sample at all, a missing or damaged image, an image
            path outside the samples' folder, a sample that does not fit, an output that exists or cannot be written.
    """
    given = _begin(samples, settings, workers)
    return _write_packs(given.tokenised(), given, output, rebuild=rebuild)


def pack_part(
    samples: Given, output: Path, settings: PackSettings, share: Share, *, workers: int | None = None
) -> None:
    """Does one part of the work of `pack`, unless it is done already. Raises InputError as `pack`."""
    _write_missing_parts(_begin(samples, settings, workers), output, share)


def merge_parts(
    samples: Given, output: Path, settings: PackSettings, share: Share, *, workers: int | None = None
) -> Manifest:
    """Packs what the parts have tokenised; see `pack`. Raises also InputError for parts that are missing or were made
    of something else."""
    return _merge(_begin(samples, settings, workers), output, share)


def _merge(given: _Given, output: Path, share: Share) -> Manifest:
    parts = finished_parts(output, share, given.made_with())
    for part in parts:
        given.images.expect(read_record(part / CHECKED))
    manifest = _write_packs(chain.from_iterable(map(read_tokens, parts)), given, output)
    remove_parts(output)
    return manifest


def pack_in_turn(
    samples: Given, output: Path, settings: PackSettings, share: Share, *, workers: int | None = None
) -> Manifest:
    """Does the parts that are not there yet, and merges them; see `pack`."""
    given = _begin(samples, settings, workers)
    if was_merged(output):
        return _finish_merge(given, output)
    _write_missing_parts(given, output, share)
    return _merge(given, output, share)


def _finish_merge(given: _Given, output: Path) -> Manifest:
    """Removes the parts of a whole that is there. Raises InputError where it was made of something else."""
    made, manifest, now = read_made_from(output), PackedDataset(output, verify=True).manifest, given.origin
    same = made is not None and (made.samples, made.tokenizer, made.options) == (
        now.samples,
        now.tokenizer,
        now.options,
    )
    if not same or any(getattr(manifest, name) != value for name, value in given.facts().items()):
        raise InputError(f"{output}: exists already, made of something else; remove it or name another output")
    remove_parts(output)
    return manifest


def _begin(samples: Given, settings: PackSettings, workers: int | None) -> _Given:
    _require_sensible(settings)
    workers = workers or usable_cores()
    encoder, files = settings.encoder(), SampleFiles(samples)
    limit = settings.max_image_pixels
    images = PackedImages(files.roots, workers, limit, files.decoded(limit))
    return _Given(files, settings, encoder, workers, images, _origin(files, encoder, settings))


def _write_missing_parts(given: _Given, output: Path, share: Share) -> None:
    """Tokenises the parts that are not there, of all or of `share.part` alone."""
    for part in missing_parts(output, share, given.made_with()):
        own, one = replace(given, images=given.images.anew()), replace(share, part=part)
        with new_part(output, one, given.made_with()) as folder:
            write_tokens(_with_images_checked(own.tokenised(one), own), folder)
            own.files.require_unchanged()
            own.images.record.write(folder / CHECKED)


@dataclass(frozen=True)
class _Given:
    """What is packed, how, its images, and what the packs are made from."""

    files: SampleFiles
    settings: PackSettings
    encoder: SampleEncoder
    workers: int
    images: PackedImages
    origin: MadeFrom

    def tokenised(self, share: Share | None = None) -> Iterator[Tokens]:
        """The samples' tokens, or those of a part."""
        return self.files.tokens(self.encoder, self.settings.max_image_pixels, self.workers, share)

    def facts(self) -> dict[str, Any]:
        """What the manifest says."""
        settings = self.settings
        return {
            "tokenizer_fingerprint": self.encoder.fingerprint,
            "tokenizer": settings.tokenizer,
            "template": settings.template,
            "visual_tokens": settings.visual_tokens,
            "pack_length": settings.pack_length,
            "max_images": settings.max_images,
            "seed": settings.seed,
        }

    def made_with(self) -> dict[str, Any]:
        """What parts of one whole have in common."""
        return {
            **self.facts(),
            "samples": self.origin.samples,
            "tokenizer_state": self.origin.tokenizer,
            "over_long": self.settings.over_long,
            "max_image_pixels": self.settings.max_image_pixels,
        }


def _origin(files: SampleFiles, encoder: SampleEncoder, settings: PackSettings) -> MadeFrom:
    """What packs are made from, the images but: those are known when they are stored."""
    return MadeFrom(
        **files.origin(),
        rendered=rendered_digest(encoder.tokenizer, settings.template),
        tokenizer=encoder.tokenizer.state(),
        options={"over_long": settings.over_long, "max_image_pixels": settings.max_image_pixels, **settings.share()},
    )


def _require_sensible(settings: PackSettings) -> None:
    template, instruction, over_long = settings.template, settings.instruction, settings.over_long
    found = find_template(template)
    if found.instruction != (instruction is not None):
        wanted = (
            "which a Q-Former reads too: expected its tokenizer (--qformer-tokenizer)"
            if found.instruction
            else "which no Q-Former reads"
        )
        raise InputError(
            f"qformer-tokenizer: found {instruction and instruction.source!r} with template '{template}', {wanted}"
        )
    for name, value in (
        ("visual tokens", settings.visual_tokens),
        ("pack length", settings.pack_length),
        ("images per pack", settings.max_images),
    ):
        if value is not None and value < 1 and (name != "visual tokens" or settings.processor is None):
            raise InputError(f"{name}: found {value}, expected at least 1")
    if over_long not in ("error", "drop"):
        raise InputError(f"over-long: found '{over_long}', expected 'error' or 'drop'")


def _with_images_checked(chunks: Iterable[Tokens], given: _Given) -> Iterator[Tokens]:
    """Passes a part's tokens on, and then decodes every image of a sample that fits into a pack. Raises InputError for
    a damaged one."""
    pack_length, max_images = given.settings.pack_length, given.settings.max_images
    first_user: dict[str, str] = {}
    for chunk in chunks:
        for sample_id, shown, length in zip(chunk.ids, chunk.images, chunk.lengths, strict=True):
            if length <= pack_length and (max_images is None or len(shown) <= max_images):
                for path in shown:
                    first_user.setdefault(path, sample_id)
        yield chunk
    for _ in given.images.read(
        [(number, path, sample_id) for number, (path, sample_id) in enumerate(first_user.items())]
    ):
        pass


def _write_packs(tokens: Iterable[Tokens], given: _Given, output: Path, *, rebuild: bool = False) -> Manifest:
    """Assigns all samples to packs and writes the shards."""
    settings, facts = given.settings, given.facts()
    pack_length, max_images = settings.pack_length, settings.max_images
    version = FORMAT_VERSION if settings.processor is None else STOCK_FORMAT
    with write_shards(output, replace=rebuild, version=version) as writer:
        spool = Spool(writer.folder, counts_matter=given.encoder.counts_matter)
        spool.fill(tokens)
        kept, misfits = _sorted_out(spool, settings)
        extra_files = _list_over_long(spool, kept, misfits, settings, writer.folder)
        image_ids = _store_images(given.images, spool, kept, writer)
        packs = spool.assign(kept, pack_length, max_images, settings.seed, padded=given.encoder.padded)
        with Progress(total=len(kept), title="packs", unit="sample") as progress:
            for samples in packs:
                writer.add_row(spool.row(samples, image_ids))
                progress.update(len(samples))
        lost = spool.spelling.for_manifest()
        spool.close()
        given.files.require_unchanged()
        given.files.add_to(given.images.record)
        write_made_from(writer.folder, given.origin, given.images.record)
        return writer.finish(extra_files, **facts, over_long=len(misfits), lost=lost)


def _sorted_out(spool: Spool, settings: PackSettings) -> tuple[np.ndarray, np.ndarray]:
    """int64, of the samples that are drawn those that fit into a pack, and those that do not."""
    pack_length, max_images = settings.pack_length, settings.max_images

    def fits(lengths: np.ndarray, num_images: np.ndarray) -> np.ndarray:
        short = lengths <= pack_length
        return short if max_images is None else short & (num_images <= max_images)

    drawn = settings.drawn if settings.fraction < 1 else None
    kept, misfits = spool.select(fits, drawn), spool.select(lambda lengths, images: ~fits(lengths, images), drawn)
    if len(kept) + len(misfits) == 0:
        raise settings.none_drawn(len(spool.ids))
    return kept, misfits


def _list_over_long(
    spool: Spool, kept: np.ndarray, misfits: np.ndarray, settings: PackSettings, folder: Path
) -> tuple[ShardFile, ...]:
    """Refuses or lists the samples that fit into no pack; returns the list's entry for the manifest."""
    if len(misfits) == 0:
        return ()
    pack_length, num_samples = settings.pack_length, len(kept) + len(misfits)
    if settings.over_long == "error":
        named = ", ".join(
            f"'{spool.ids[one]}' ({spool.lengths[one]} tokens, {spool.num_images[one]} images)" for one in misfits[:8]
        )
        bound = "" if settings.max_images is None else f" and {settings.max_images} images"
        raise InputError(
            f"{len(misfits)} of {num_samples} samples do not fit into a pack of {pack_length} tokens{bound}: "
            f"{named}{', ...' if len(misfits) > 8 else ''}. "
            f"The longest has {spool.lengths.max()} tokens: raise the pack length (or images per pack), or "
            "leave such samples out with --over-long drop (in a recipe: data.over_long: drop)"
        )
    if len(kept) == 0:
        raise InputError(
            f"none of {num_samples} samples fits into a pack of {pack_length} tokens; the shortest has "
            f"{spool.lengths.min()}"
        )
    path = folder / OVER_LONG
    records = (
        {"id": spool.ids[one], "num_tokens": int(spool.lengths[one]), "num_images": int(spool.num_images[one])}
        for one in misfits
    )
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return (describe(path, len(misfits)),)


def _store_images(images: PackedImages, spool: Spool, kept: np.ndarray, writer: ShardWriter) -> np.ndarray:
    """Stores every image that a kept sample shows. Returns int64 [paths], the stored image's number or -1."""
    paths, wanted = list(spool.paths), list[Wanted]()
    is_met = np.zeros(len(paths), bool)
    for part in in_slices(len(kept)):
        refs, users = spool.refs(kept[part]), np.repeat(kept[part], spool.num_images[kept[part]])
        _, firsts = np.unique(refs, return_index=True)
        new = np.sort(firsts[~is_met[refs[firsts]]])
        is_met[refs[new]] = True
        wanted += [(ref, paths[ref], spool.ids[user]) for ref, user in zip(refs[new].tolist(), users[new].tolist())]
    image_ids = np.full(len(paths), -1, np.int64)
    for ref, data in images.read(wanted):
        image_ids[ref] = writer.add_image(data)
    return image_ids


EXAMPLES = (
    "--samples data/easyvqa/samples/train.jsonl --tokenizer asset://tiny_llama --visual-tokens 4 --pack-length "
    "1024 --output data/easyvqa/mine",
    "--samples easyvqa=data/easyvqa/samples/train.jsonl shapes=data/shapes/samples/train.jsonl --tokenizer "
    "asset://tiny_llama --visual-tokens 4 --pack-length 1024 --output data/both/packed",
)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    given = pack_options(arguments, EXAMPLES).read()
    start_logging(quiet=given.quiet)
    share = read_share(given)
    if share is not None and given.rebuild:
        raise InputError("--rebuild cannot be combined with --parts; remove the output, or name another one")
    settings, samples = settings_of(given), read_given(given.samples)
    if share is None:
        manifest = pack(samples, given.output, settings, workers=given.workers, rebuild=given.rebuild)
    elif share.in_turn:
        manifest = pack_in_turn(samples, given.output, settings, share, workers=given.workers)
    elif share.part is None:
        manifest = merge_parts(samples, given.output, settings, share, workers=given.workers)
    else:
        pack_part(samples, given.output, settings, share, workers=given.workers)
        print(f"part {share.part} of {share.parts} is done")
        return
    print(
        f"{manifest.num_packs} packs, {manifest.num_samples} samples, {manifest.num_images} images, "
        f"{manifest.num_tokens} tokens "
        f"({manifest.num_label_tokens} predicted), fill {manifest.fill:.4f}"
        + (f", {manifest.over_long} over-long left out" if manifest.over_long else "")
    )


if __name__ == "__main__":
    raise SystemExit(main())
