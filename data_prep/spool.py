"""Where tokenised samples wait for their packs: tokens on disk, some tens of bytes per sample (and its id) in
memory."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from data_prep.tokens import Tokens
from vltrain.data.batching import batch_lengths
from vltrain.data.packing import pack_lengths
from vltrain.data.text.spelling import Spelling, describe_lost
from vltrain.errors import InputError
from vltrain.schema import PackedRow

logger = logging.getLogger(__name__)


class Spool:
    """All tokenised samples: their tokens in flat files, the rest in memory.

    lengths [n] tokens, num_labels [n] of them predicted, num_images [n], instruction_lengths [n]; `paths` are the
    distinct image paths, `image_refs` each sample's, one after another, `image_tokens` their placeholders where they
    differ.
    """

    def __init__(self, folder: Path, *, counts_matter: bool = False) -> None:
        """`counts_matter`: an image that stands alone in its sample is another than one of several."""
        self._files = {
            name: folder / f"{name}.spool"
            for name in ("input_ids", "loss_mask", "instruction_ids", "position_ids", "blocks")
        }
        self._counts_matter = counts_matter
        self._position_rows = 0
        self.ids: list[str] = []
        self.paths: dict[str, int] = {}
        self.spelling = Spelling()

    def fill(self, parts: Iterable[Tokens]) -> None:
        """Takes all samples; InputError if there is none or an id comes twice."""
        lengths, num_labels, num_images, image_refs, instructions, image_tokens = (array("q") for _ in range(6))
        seen: set[str] = set()
        cuts = 0
        with ExitStack() as stack:
            files = {name: stack.enter_context(path.open("wb")) for name, path in self._files.items()}
            for part in parts:
                for name, file in files.items():
                    file.write(getattr(part, name))
                self._position_rows = max(self._position_rows, part.position_rows)
                image_tokens.extend(part.image_tokens)
                lengths.extend(part.lengths)
                num_labels.extend(part.num_labels)
                instructions.extend(part.instruction_lengths)
                cuts += part.instruction_cuts
                self.spelling.merge(part.spelling)
                self.ids.extend(part.ids)
                for sample_id, images in zip(part.ids, part.images, strict=True):
                    if sample_id in seen:
                        raise InputError(f"sample id '{sample_id}' comes twice; ids must be unique")
                    seen.add(sample_id)
                    num_images.append(len(images))
                    image_refs.extend(self.paths.setdefault(path, len(self.paths)) for path in images)
        if not self.ids:
            raise InputError("the file of samples is empty; there is nothing to pack")
        if cuts:
            told = (
                "of %d prompts the Q-Former reads only the beginning (--qformer-tokens, in a recipe "
                "model.instructblip.qformer_tokens)"
            )
            logger.warning(told, cuts)
        for line in describe_lost(self.spelling.for_manifest(), len(self.ids)):
            logger.warning("%s", line)
        self.lengths, self.num_labels, self.num_images, self.image_refs, self.instruction_lengths = (
            np.frombuffer(one, np.int64) for one in (lengths, num_labels, num_images, image_refs, instructions)
        )
        self.image_tokens = np.frombuffer(image_tokens, np.int64)
        self._starts, self._image_starts, self._instruction_starts = (
            np.cumsum(one) - one for one in (self.lengths, self.num_images, self.instruction_lengths)
        )
        self._flat = {
            name: _mapped(path, np.bool_ if name == "loss_mask" else np.int32) for name, path in self._files.items()
        }

    def assign(
        self, kept: np.ndarray, pack_length: int, max_images: int | None, seed: int, *, padded: bool
    ) -> tuple[np.ndarray, np.ndarray]:
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
        flat = self._flat
        lengths, starts = self.instruction_lengths[samples], self._instruction_starts[samples]
        instructions = [flat["instruction_ids"][start : start + length] for start, length in zip(starts, lengths)]
        return PackedRow(
            input_ids=np.concatenate([flat["input_ids"][span] for span in spans]),
            loss_mask=np.concatenate([flat["loss_mask"][span] for span in spans]),
            segment_lengths=self.lengths[samples].astype(np.int32),
            sample_ids=tuple(self.ids[int(sample)] for sample in samples),
            instruction_ids=np.concatenate(instructions),
            instruction_lengths=lengths.astype(np.int32) if lengths.any() else np.empty(0, np.int32),
            position_ids=self._positions(spans),
            blocks=np.concatenate([flat["blocks"][span] for span in spans]),
            **self._shown(samples, image_ids),
        )

    def _positions(self, spans: list[slice]) -> np.ndarray:
        """int32 [R, T], [0, 0] where there is none: each sample's rows lie together on disk."""
        rows = self._position_rows
        if not rows:
            return np.empty((0, 0), np.int32)
        own = [self._flat["position_ids"][rows * span.start : rows * span.stop].reshape(rows, -1) for span in spans]
        return np.concatenate(own, axis=1)

    def _shown(self, samples: np.ndarray, image_ids: np.ndarray) -> dict[str, np.ndarray]:
        """The images of a pack: each once; where that matters, those that stand alone in a sample apart and first."""
        firsts, counts = self._image_starts[samples], self.num_images[samples]
        own: list[np.ndarray] = [np.arange(first, first + count) for first, count in zip(firsts, counts)]
        runs = np.concatenate(own)
        kinds = np.repeat(np.minimum(counts, 2), counts) if self._counts_matter else np.ones(len(runs), np.int64)
        shown = image_ids[self.image_refs[runs]]
        most = len(image_ids) + 1
        distinct, first_runs, slots = np.unique(kinds * most + shown, return_index=True, return_inverse=True)
        found = {"image_ids": distinct % most, "image_slots": slots.astype(np.int32)}
        if len(self.image_tokens):
            found["image_tokens"] = self.image_tokens[runs[first_runs]].astype(np.int32)
            found["image_counts"] = (distinct // most).astype(np.int32)
        return found

    def remove(self) -> None:
        self._flat = {}
        for file in self._files.values():
            file.unlink()


def _mapped(path: Path, dtype: type[np.int32] | type[np.bool_]) -> np.ndarray:
    """A flat file, mapped; as an array, since slicing a memmap takes ten times as long. Empty where it is."""
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)
