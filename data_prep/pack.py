"""Samples -> packed shards: `python -m data_prep.pack --samples FILE.jsonl --tokenizer PLACE --visual-tokens V --pack-length T --output DIR`.

Reads and checks every sample, tokenises them in several processes, deals them to packs (`vltrain.data.packing`), and writes the shards with
each distinct image once. Tokens wait on disk between the two passes, so memory grows only by some tens of bytes per sample
(and its id). A sample that does not fit into a pack is never cut: it is an error, or with `--over-long drop` left out
and listed in `over_long.jsonl`.
"""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.command_line import CommandLine
from data_prep.parallel import in_chunks, ordered_map, usable_cores
from data_prep.prepare import MAX_IMAGE_PIXELS, read_image
from vltrain.data.batching import batch_lengths
from vltrain.data.conversation import TEMPLATES, encode_sample, find_template
from vltrain.data.images import open_rgb
from vltrain.data.instruction import InstructionSource
from vltrain.data.packing import pack_lengths
from vltrain.data.shard_writer import ShardWriter, describe, write_shards
from vltrain.data.shards import Manifest, ShardFile
from vltrain.data.tokenizer import Tokenizer, load_tokenizer
from vltrain.errors import InputError, exits_cleanly
from vltrain.schema import PackedRow, Sample, Segment

logger = logging.getLogger(__name__)

OVER_LONG = "over_long.jsonl"
_LINES_PER_CHUNK = 512
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
) -> Manifest:
    """Packs a file of samples.

    Args:
        samples: JSONL, a `vltrain.schema.Sample` per line; image paths are relative to its folder.
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

    Returns:
        The manifest of the written shards.

    Raises:
        InputError: a malformed sample, an id that comes twice, no sample at all, a missing or damaged image, an image path outside the samples'
            folder, a sample that does not fit, an output that exists or cannot be written.
    """
    found = find_template(template)
    if found.instruction != (instruction is not None):
        wanted = "which a Q-Former reads too: expected its tokenizer (--qformer-tokenizer)" if found.instruction else "which no Q-Former reads"
        raise InputError(f"qformer-tokenizer: found {instruction and instruction.source!r} with template '{template}', {wanted}")
    for name, value in (("visual tokens", visual_tokens), ("pack length", pack_length), ("images per pack", max_images)):
        if value is not None and value < 1:
            raise InputError(f"{name}: found {value}, expected at least 1")
    if over_long not in ("error", "drop"):
        raise InputError(f"over-long: found '{over_long}', expected 'error' or 'drop'")
    workers = usable_cores() if workers is None else workers
    loaded = load_tokenizer(tokenizer, instruction)
    with write_shards(output) as writer:
        spool = _Spool(writer.folder)
        spool.fill(_tokenised(samples, loaded, template, visual_tokens, workers))
        fits = spool.fitting(pack_length, max_images)
        extra_files = _settle_over_long(spool, fits, pack_length, max_images, over_long, writer.folder)
        kept = np.flatnonzero(fits)
        image_ids = _store_images(samples.parent, spool, kept, writer, workers, max_image_pixels)
        spool.tell_cuts(instruction)
        order, starts = spool.deal(kept, pack_length, max_images, seed, found.padded)
        for first, last in zip(tqdm(starts[:-1], desc="packs", unit="pack", disable=None), starts[1:], strict=True):
            writer.add_row(spool.row(kept[order[first:last]], image_ids))
        spool.remove()
        return writer.finish(
            extra_files,
            tokenizer_fingerprint=loaded.fingerprint, tokenizer=tokenizer, template=template, visual_tokens=visual_tokens,
            pack_length=pack_length, max_images=max_images, seed=seed, over_long=len(fits) - len(kept),
        )  # fmt: skip


@dataclass(kw_only=True)
class _Tokens:
    """Some tokenised samples, as arrays: cheap to send between processes."""

    ids: list[str] = field(default_factory=list)
    images: list[tuple[str, ...]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    num_labels: list[int] = field(default_factory=list)
    instruction_lengths: list[int] = field(default_factory=list)
    instruction_cuts: int = 0
    input_ids: bytes = b""  # int32
    loss_mask: bytes = b""  # bool
    instruction_ids: bytes = b""  # int32


def _tokenised(samples: Path, tokenizer: Tokenizer, template: str, visual_tokens: int, workers: int) -> Iterator[_Tokens]:
    try:
        num_bytes = samples.stat().st_size
        stream = samples.open("rb")
    except OSError as error:
        raise InputError(f"{samples}: cannot be read ({error.strerror})") from None
    shared = (str(samples), tokenizer, template, visual_tokens)
    with stream, tqdm(total=num_bytes, desc="samples", unit="B", unit_scale=True, disable=None) as progress:
        chunks = in_chunks(enumerate(stream, start=1), _LINES_PER_CHUNK)
        # A small file is done before a second process has started.
        for tokens in ordered_map(_tokenise, chunks, workers if num_bytes > 1 << 20 else 1, shared):
            yield tokens
            progress.update(stream.tell() - progress.n)


def _tokenise(lines: list[tuple[int, bytes]], file: str, tokenizer: Tokenizer, template: str, visual_tokens: int) -> _Tokens:
    segments: list[Segment] = []
    for number, line in lines:
        where = f"{file}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: not JSON ({error})") from None
        sample = Sample.from_json(record, where)
        segments.append(encode_sample(sample, tokenizer, template, visual_tokens))
    return _Tokens(
        ids=[segment.sample_id for segment in segments],
        images=[segment.images for segment in segments],
        lengths=[len(segment.input_ids) for segment in segments],
        num_labels=[int(segment.loss_mask.sum()) for segment in segments],
        instruction_lengths=[len(segment.instruction_ids) for segment in segments],
        instruction_cuts=sum(segment.instruction_cut > 0 for segment in segments),
        input_ids=b"".join(segment.input_ids.tobytes() for segment in segments),
        loss_mask=b"".join(segment.loss_mask.tobytes() for segment in segments),
        instruction_ids=b"".join(segment.instruction_ids.tobytes() for segment in segments),
    )


class _Spool:
    """All tokenised samples: their tokens in two flat files, the rest in memory.

    lengths [n] tokens, num_labels [n] of them predicted, num_images [n], instruction_lengths [n]; `paths` are the distinct image paths,
    `image_refs` each sample's, one after another.
    """

    def __init__(self, folder: Path) -> None:
        self._files = (folder / "tokens.spool", folder / "mask.spool", folder / "instruction.spool")
        self.ids: list[str] = []
        self.paths: dict[str, int] = {}

    def fill(self, parts: Iterator[_Tokens]) -> None:
        """Takes all samples; InputError if there is none or an id comes twice."""
        lengths, num_labels, num_images, image_refs, instructions = (array("q") for _ in range(5))
        seen: set[str] = set()
        self._cuts = 0
        with self._files[0].open("wb") as tokens, self._files[1].open("wb") as mask, self._files[2].open("wb") as instruction:
            for part in parts:
                tokens.write(part.input_ids)
                mask.write(part.loss_mask)
                instruction.write(part.instruction_ids)
                lengths.extend(part.lengths)
                num_labels.extend(part.num_labels)
                instructions.extend(part.instruction_lengths)
                self._cuts += part.instruction_cuts
                self.ids.extend(part.ids)
                for sample_id, images in zip(part.ids, part.images, strict=True):
                    if sample_id in seen:
                        raise InputError(f"sample id '{sample_id}' comes twice; ids must be unique")
                    seen.add(sample_id)
                    num_images.append(len(images))
                    image_refs.extend(self.paths.setdefault(path, len(self.paths)) for path in images)
        if not self.ids:
            raise InputError("the file of samples is empty; there is nothing to pack")
        self.lengths, self.num_labels, self.num_images, self.image_refs, self.instruction_lengths = (
            np.frombuffer(one, np.int64) for one in (lengths, num_labels, num_images, image_refs, instructions)
        )
        self._starts, self._image_starts, self._instruction_starts = (
            np.cumsum(one) - one for one in (self.lengths, self.num_images, self.instruction_lengths)
        )
        self._tokens, self._mask = np.memmap(self._files[0], np.int32, "r"), np.memmap(self._files[1], bool, "r")
        has_instruction = self.instruction_lengths.any()
        self._instruction = np.memmap(self._files[2], np.int32, "r") if has_instruction else np.empty(0, np.int32)

    def tell_cuts(self, instruction: InstructionSource | None) -> None:
        """Says how many prompts a Q-Former reads the beginning of only."""
        if self._cuts and instruction is not None:
            told = "of %d prompts the Q-Former reads the first %d tokens only (--qformer-tokens, in a recipe model.instructblip.qformer_tokens)"
            logger.warning(told, self._cuts, instruction.max_tokens)

    def deal(self, kept: np.ndarray, pack_length: int, max_images: int | None, seed: int, padded: bool) -> tuple[np.ndarray, np.ndarray]:
        """Which of the samples `kept` share a pack, or a padded batch: see `vltrain.data.packing.pack_lengths`."""
        lengths, images = self.lengths[kept], self.num_images[kept]
        if not padded:
            return pack_lengths(lengths, pack_length, images, max_images, seed)
        answers = self.num_labels[kept]
        return batch_lengths(lengths - answers, answers, pack_length, images, max_images, seed)

    def fitting(self, pack_length: int, max_images: int | None) -> np.ndarray:
        """bool [n], whether the sample fits into a pack by itself."""
        fits = self.lengths <= pack_length
        return fits if max_images is None else fits & (self.num_images <= max_images)

    def refs(self, sample: int) -> np.ndarray:
        """Which of `paths` a sample shows, int64."""
        first = self._image_starts[sample]
        return self.image_refs[first : first + self.num_images[sample]]

    def row(self, samples: np.ndarray, image_ids: np.ndarray) -> PackedRow:
        """The pack of some samples. `image_ids` int64 [paths]: the stored image behind each path."""
        spans = [slice(self._starts[sample], self._starts[sample] + self.lengths[sample]) for sample in samples]
        shown = np.concatenate([image_ids[self.refs(sample)] for sample in samples])
        distinct, slots = np.unique(shown, return_inverse=True)
        lengths, starts = self.instruction_lengths[samples], self._instruction_starts[samples]
        instructions = [self._instruction[start : start + length] for start, length in zip(starts, lengths)]
        return PackedRow(
            input_ids=np.concatenate([self._tokens[span] for span in spans]),
            loss_mask=np.concatenate([self._mask[span] for span in spans]),
            segment_lengths=self.lengths[samples].astype(np.int32),
            image_ids=distinct,
            image_slots=slots.astype(np.int32),
            sample_ids=tuple(self.ids[sample] for sample in samples),
            instruction_ids=np.concatenate(instructions),
            instruction_lengths=lengths.astype(np.int32) if lengths.any() else np.empty(0, np.int32),
        )

    def remove(self) -> None:
        del self._tokens, self._mask, self._instruction
        for file in self._files:
            file.unlink()


def _settle_over_long(
    spool: _Spool, fits: np.ndarray, pack_length: int, max_images: int | None, over_long: str, folder: Path
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
    root: Path, spool: _Spool, kept: np.ndarray, writer: ShardWriter, workers: int, max_image_pixels: int
) -> np.ndarray:
    """Decodes (to check) and stores every image that a kept sample shows. Returns int64 [paths], the stored image's number or -1."""
    first_user: dict[int, int] = {}
    for sample in kept[spool.num_images[kept] > 0].tolist():
        for ref in spool.refs(sample).tolist():
            first_user.setdefault(ref, sample)
    paths = list(spool.paths)
    wanted = [(ref, paths[ref], spool.ids[sample]) for ref, sample in first_user.items()]
    image_ids = np.full(len(paths), -1, np.int64)
    chunks = in_chunks(wanted, _IMAGES_PER_CHUNK)
    checked = ordered_map(_check_images, chunks, min(workers, 1 + len(wanted) // 64), (str(root), max_image_pixels))
    with tqdm(total=len(wanted), desc="images", unit="image", disable=None) as progress:
        for chunk in checked:
            for ref, data in chunk:
                image_ids[ref] = writer.add_image(data)
            progress.update(len(chunk))
    return image_ids


def _check_images(wanted: list[tuple[int, str, str]], root: str, max_pixels: int) -> list[tuple[int, bytes]]:
    """Reads and decodes images (number, path, sample); returns their numbers and file bytes."""
    checked = []
    folder = Path(root).resolve()
    for ref, name, sample_id in wanted:
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"sample '{sample_id}': image path '{name}' leads out of {folder}; paths are relative to the samples' folder")
        data = read_image(path, sample_id)
        open_rgb(data, max_pixels, f"sample '{sample_id}', image {path}")
        checked.append((ref, data))
    return checked


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine("pack", "Tokenise and pack samples.", arguments)
    parser.add_argument("--samples", type=Path, required=True, help="JSONL file that data_prep.prepare wrote")
    parser.add_argument("--tokenizer", required=True, help="folder, file, hub name, asset:// or package://")
    parser.add_argument("--template", default="mmt", help=f"one of {', '.join(TEMPLATES)}")
    parser.add_argument("--visual-tokens", type=int, required=True, help="tokens that an image takes in the model")
    parser.add_argument("--qformer-tokenizer", help="for an InstructBLIP: the tokenizer by which its Q-Former reads prompts")
    parser.add_argument("--qformer-tokens", type=int, default=128, help="tokens of a prompt that the Q-Former reads at most")
    parser.add_argument("--pack-length", type=int, required=True, help="tokens that a pack holds")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument("--max-images", type=int, help="images that a pack may hold (default: no bound)")
    parser.add_argument("--seed", type=int, default=0, help="of the deal to packs")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    parser.add_argument("--over-long", default="error", help="error (default) or drop: what to do with samples longer than a pack")
    parser.add_argument("--max-image-pixels", type=int, default=MAX_IMAGE_PIXELS, help="larger images are refused")
    given = vars(parser.read())
    read_with, max_tokens = given.pop("qformer_tokenizer"), given.pop("qformer_tokens")
    manifest = pack(**given, instruction=InstructionSource(source=read_with, max_tokens=max_tokens) if read_with else None)
    print(
        f"{manifest.num_packs} packs, {manifest.num_samples} samples, {manifest.num_images} images, {manifest.num_tokens} tokens "
        f"({manifest.num_label_tokens} predicted), fill {manifest.fill:.4f}" + (f", {manifest.over_long} over-long left out" if manifest.over_long else "")
    )


if __name__ == "__main__":
    raise SystemExit(main())
