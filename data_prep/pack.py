"""Samples -> packed shards: `python -m data_prep.pack --samples FILE.jsonl --tokenizer PLACE --visual-tokens V --pack-length T --output DIR`.

Reads and checks every sample, tokenises them in several processes, deals them to packs (`vltrain.data.packing`), and writes the shards with
each distinct image once. Tokens wait on disk between the two passes, so memory grows only by some tens of bytes per sample
(and its id). A sample that does not fit into a pack is never cut: it is an error, or with `--over-long drop` left out
and listed in `over_long.jsonl`.

In parts (`data_prep.parts`) each part tokenises and decodes its share of the file, which is what takes time; the merge deals all samples to packs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.command_line import CommandLine, whole
from data_prep.parallel import in_chunks, ordered_map, usable_cores
from data_prep.parts import Share, add_share_options, finished_parts, is_done, new_part, read_share, remove_parts
from data_prep.prepare import MAX_IMAGE_PIXELS, tell_dark
from data_prep.spool import Spool
from data_prep.tokens import Tokens, read_tokens, tokenised, write_tokens
from vltrain.data.conversation import TEMPLATES, find_template, fingerprint
from vltrain.data.images import is_dark, read_image
from vltrain.data.instruction import InstructionSource
from vltrain.data.shard_writer import ShardWriter, describe, write_shards
from vltrain.data.shards import Manifest, ShardFile, sha256_of
from vltrain.data.tokenizer import load_tokenizer
from vltrain.errors import InputError, exits_cleanly
from vltrain.ranges import MOST_PIXELS, MOST_SEED, MOST_SIZE, MOST_TOKENS, MOST_WORKERS

OVER_LONG = "over_long.jsonl"
_IMAGES_PER_CHUNK = 16


def pack(
    samples: Path,
    tokenizer: str,
    template: str,
    visual_tokens: int,
    pack_length: int,
    output: Path,
    *,
    max_images: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    over_long: str = "error",
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    instruction: InstructionSource | None = None,
    share: Share | None = None,
) -> Manifest | None:
    """Packs a file of samples.

    Args:
        samples: JSONL of `vltrain.schema.Sample`; image paths are relative to its folder.
        tokenizer: any notation of `vltrain.locate`.
        template: a name of `vltrain.data.conversation.TEMPLATES`.
        visual_tokens: V, tokens that an image takes.
        pack_length: tokens that a pack holds.
        output: new folder.
        max_images: images that a pack may hold; None: no bound.
        seed: of the deal to packs.
        workers: processes; None: all usable cores. The result does not depend on it.
        over_long: "error" or "drop", for samples that do not fit into a pack.
        instruction: the Q-Former's tokenizer, for templates that one reads.
        share: do only a part of the work, or merge the parts; None: everything at once.

    Returns:
        The manifest of the written shards; None after a part.

    Raises:
        InputError: a malformed sample, an id that comes twice, no sample at all, a missing or damaged image, an image path outside the samples'
            folder, a sample that does not fit, an output that exists or cannot be written, parts that are missing or were made of something else.
    """
    _require_sensible(template, instruction, visual_tokens, pack_length, max_images, over_long)
    workers = usable_cores() if workers is None else workers
    loaded = load_tokenizer(tokenizer, instruction)
    facts = {
        "tokenizer_fingerprint": fingerprint(loaded, template), "tokenizer": tokenizer, "template": template, "visual_tokens": visual_tokens,
        "pack_length": pack_length, "max_images": max_images, "seed": seed,
    }  # fmt: skip
    if share is None:
        tokens = tokenised(samples, loaded, template, visual_tokens, workers)
        return _write_packs(tokens, samples.parent, output, facts, over_long, workers, max_image_pixels)
    made_with = {**facts, "samples": _digest(samples), "over_long": over_long, "max_image_pixels": max_image_pixels}
    if share.part is None:
        tokens = chain.from_iterable(map(read_tokens, finished_parts(output, share, made_with)))
        manifest = _write_packs(tokens, samples.parent, output, facts, over_long, workers, max_image_pixels, decode=False)
        remove_parts(output)
        return manifest
    if not is_done(output, share, made_with):
        with new_part(output, share, made_with) as folder:
            tokens = tokenised(samples, loaded, template, visual_tokens, workers, share)
            write_tokens(_with_images_checked(tokens, samples.parent, pack_length, max_images, workers, max_image_pixels), folder)
    return None


def _require_sensible(
    template: str, instruction: InstructionSource | None, visual_tokens: int, pack_length: int, max_images: int | None, over_long: str
) -> None:
    found = find_template(template)
    if found.instruction != (instruction is not None):
        wanted = "which a Q-Former reads too: expected its tokenizer (--qformer-tokenizer)" if found.instruction else "which no Q-Former reads"
        raise InputError(f"qformer-tokenizer: found {instruction and instruction.source!r} with template '{template}', {wanted}")
    for name, value in (("visual tokens", visual_tokens), ("pack length", pack_length), ("images per pack", max_images)):
        if value is not None and value < 1:
            raise InputError(f"{name}: found {value}, expected at least 1")
    if over_long not in ("error", "drop"):
        raise InputError(f"over-long: found '{over_long}', expected 'error' or 'drop'")


def _digest(samples: Path) -> str:
    try:
        return sha256_of(samples)
    except OSError as error:
        raise InputError(f"{samples}: cannot be read ({error.strerror})") from None


def _with_images_checked(
    chunks: Iterable[Tokens], root: Path, pack_length: int, max_images: int | None, workers: int, max_image_pixels: int
) -> Iterator[Tokens]:
    """Passes a part's tokens on, and then decodes every image of a sample that fits into a pack. Raises InputError for a damaged one."""
    first_user: dict[str, str] = {}
    for chunk in chunks:
        for sample_id, images, length in zip(chunk.ids, chunk.images, chunk.lengths, strict=True):
            if length <= pack_length and (max_images is None or len(images) <= max_images):
                for path in images:
                    first_user.setdefault(path, sample_id)
        yield chunk
    wanted = [(number, path, sample_id) for number, (path, sample_id) in enumerate(first_user.items())]
    for _ in _checked_images(wanted, root, workers, max_image_pixels):
        pass


def _write_packs(
    tokens: Iterable[Tokens], root: Path, output: Path, facts: dict[str, Any], over_long: str, workers: int, max_image_pixels: int, *, decode: bool = True
) -> Manifest:
    """Deals all samples to packs and writes the shards. `decode` False: the images have been decoded and are only read."""
    pack_length, max_images = facts["pack_length"], facts["max_images"]
    with write_shards(output) as writer:
        spool = Spool(writer.folder)
        spool.fill(tokens)
        fits = spool.fitting(pack_length, max_images)
        extra_files = _settle_over_long(spool, fits, pack_length, max_images, over_long, writer.folder)
        kept = np.flatnonzero(fits)
        image_ids = _store_images(root, spool, kept, writer, workers, max_image_pixels, decode)
        order, starts = spool.deal(kept, pack_length, max_images, facts["seed"], padded=find_template(facts["template"]).padded)
        for first, last in zip(tqdm(starts[:-1], desc="packs", unit="pack", disable=None), starts[1:], strict=True):
            writer.add_row(spool.row(kept[order[first:last]], image_ids))
        lost = spool.spelling.for_manifest()
        spool.remove()
        return writer.finish(extra_files, **facts, over_long=len(fits) - len(kept), lost=lost)


def _settle_over_long(
    spool: Spool, fits: np.ndarray, pack_length: int, max_images: int | None, over_long: str, folder: Path
) -> tuple[ShardFile, ...]:
    """Refuses or lists the samples that fit into no pack; returns the list's entry for the manifest."""
    if fits.all():
        return ()
    misfits = np.flatnonzero(~fits)
    if over_long == "error":
        named = ", ".join(f"'{spool.ids[one]}' ({spool.lengths[one]} tokens, {spool.num_images[one]} images)" for one in misfits[:8])
        bound = "" if max_images is None else f" and {max_images} images"
        raise InputError(
            f"{len(misfits)} of {len(fits)} samples do not fit into a pack of {pack_length} tokens{bound}: {named}{', ...' if len(misfits) > 8 else ''}. "
            f"The longest has {spool.lengths.max()} tokens: raise the pack length (or images per pack), or leave such samples out with --over-long drop (in a recipe: data.over_long: drop)"
        )
    if not fits.any():
        raise InputError(f"none of {len(fits)} samples fits into a pack of {pack_length} tokens; the shortest has {spool.lengths.min()}")
    path = folder / OVER_LONG
    records = ({"id": spool.ids[one], "num_tokens": int(spool.lengths[one]), "num_images": int(spool.num_images[one])} for one in misfits)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return (describe(path, len(misfits)),)


def _store_images(
    root: Path, spool: Spool, kept: np.ndarray, writer: ShardWriter, workers: int, max_image_pixels: int, decode: bool
) -> np.ndarray:
    """Decodes (to check, if `decode`) and stores every image that a kept sample shows. Returns int64 [paths], the stored image's number or -1."""
    first_user: dict[int, int] = {}
    for sample in kept[spool.num_images[kept] > 0].tolist():
        for ref in spool.refs(sample).tolist():
            first_user.setdefault(ref, sample)
    paths = list(spool.paths)
    wanted = [(ref, paths[ref], spool.ids[sample]) for ref, sample in first_user.items()]
    image_ids = np.full(len(paths), -1, np.int64)
    for ref, data in _checked_images(wanted, root, workers, max_image_pixels, decode):
        image_ids[ref] = writer.add_image(data)
    return image_ids


def _checked_images(
    wanted: list[tuple[int, str, str]], root: Path, workers: int, max_image_pixels: int, decode: bool = True
) -> Iterator[tuple[int, bytes]]:
    """Reads and, if `decode`, decodes images (number, path, sample) in several processes; yields their numbers and file bytes, in order."""
    chunks = in_chunks(wanted, _IMAGES_PER_CHUNK)
    checked = ordered_map(_check_images, chunks, workers, (str(root), max_image_pixels, decode))
    dark: list[str] = []
    with tqdm(total=len(wanted), desc="images", unit="image", disable=None) as progress:
        for chunk, found in checked:
            yield from chunk
            dark += found
            progress.update(len(chunk))
    tell_dark(dark)


def _check_images(wanted: list[tuple[int, str, str]], root: str, max_pixels: int, decode: bool) -> tuple[list[tuple[int, bytes]], list[str]]:
    """Reads and, if `decode`, decodes images (number, path, sample); returns their numbers and file bytes, and the paths of those that come out dark."""
    checked, dark = [], []
    folder = Path(root)
    for ref, name, sample_id in wanted:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"sample '{sample_id}': image path '{name}' leads out of {folder}; paths are relative to the samples' folder")
        where = f"sample '{sample_id}', image {folder / name}"
        data = read_image(folder / name, max_pixels, where, inside=folder)
        if decode and is_dark(data, max_pixels, where):
            dark.append(name)
        checked.append((ref, data))
    return checked, dark


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine("pack", "Tokenise and pack samples.", arguments)
    parser.add_argument("--samples", type=Path, required=True, help="JSONL file that data_prep.prepare wrote")
    parser.add_argument("--tokenizer", required=True, help="folder, file, hub name, asset:// or package://")
    parser.add_argument("--template", default="mmt", help=f"one of {', '.join(TEMPLATES)}")
    parser.add_argument("--visual-tokens", type=whole(1, MOST_SIZE), required=True, help="tokens that an image takes in the model")
    parser.add_argument("--qformer-tokenizer", help="for an InstructBLIP: the tokenizer by which its Q-Former reads prompts")
    parser.add_argument("--qformer-tokens", type=whole(3, MOST_SIZE), default=128, help="tokens of a prompt that the Q-Former reads at most")
    parser.add_argument("--pack-length", type=whole(8, MOST_TOKENS), required=True, help="tokens that a pack holds")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument("--max-images", type=whole(1, MOST_SIZE), help="images that a pack may hold (default: no bound)")
    parser.add_argument("--seed", type=whole(0, MOST_SEED), default=0, help="of the deal to packs")
    parser.add_argument("--workers", type=whole(1, MOST_WORKERS), help="processes (default: all cores)")
    parser.add_argument("--over-long", default="error", help="error (default) or drop: what to do with samples longer than a pack")
    parser.add_argument("--max-image-pixels", type=whole(1, MOST_PIXELS), default=MAX_IMAGE_PIXELS, help="larger images are refused")
    add_share_options(parser)
    given = parser.read()
    share = read_share(given)
    settings = vars(given)
    read_with, max_tokens = settings.pop("qformer_tokenizer"), settings.pop("qformer_tokens")
    manifest = pack(**settings, instruction=InstructionSource(source=read_with, max_tokens=max_tokens) if read_with else None, share=share)
    if manifest is None:
        assert share is not None
        print(f"part {share.part} of {share.parts} is done")
        return
    print(
        f"{manifest.num_packs} packs, {manifest.num_samples} samples, {manifest.num_images} images, {manifest.num_tokens} tokens "
        f"({manifest.num_label_tokens} predicted), fill {manifest.fill:.4f}" + (f", {manifest.over_long} over-long left out" if manifest.over_long else "")
    )


if __name__ == "__main__":
    raise SystemExit(main())
