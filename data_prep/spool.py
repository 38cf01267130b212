"""Where tokenised samples wait for their packs: tokens on disk, some tens of bytes per sample (and its id) in
memory."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable
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
    """All tokenised samples: their tokens in two flat files, the rest in memory.

    lengths [n] tokens, num_labels [n] of them predicted, num_images [n], instruction_lengths [n]; `paths` are the
    distinct image paths, `image_refs` each sample's, one after another.
    """

    def __init__(self, folder: Path) -> None:
        self._files = (folder / "tokens.spool", folder / "mask.spool", folder / "instruction.spool")
        self.ids: list[str] = []
        self.paths: dict[str, int] = {}
        self.spelling = Spelling()

    def fill(self, parts: Iterable[Tokens]) -> None:
        """Takes all samples; InputError if there is none or an id comes twice."""
        lengths, num_labels, num_images, image_refs, instructions = (array("q") for _ in range(5))
        seen: set[str] = set()
        cuts = 0
        with (
            self._files[0].open("wb") as tokens,
            self._files[1].open("wb") as mask,
            self._files[2].open("wb") as instruction,
        ):
            for part in parts:
                tokens.write(part.input_ids)
                mask.write(part.loss_mask)
                instruction.write(part.instruction_ids)
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
        self._starts, self._image_starts, self._instruction_starts = (
            np.cumsum(one) - one for one in (self.lengths, self.num_images, self.instruction_lengths)
        )
        # Slicing a memmap takes ten times as long as slicing an array.
        self._tokens, self._mask = (
            np.asarray(np.memmap(file, dtype, "r")) for file, dtype in zip(self._files, (np.int32, bool))
        )
        has_instruction = self.instruction_lengths.any()
        self._instruction = (
            np.asarray(np.memmap(self._files[2], np.int32, "r")) if has_instruction else np.empty(0, np.int32)
        )

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
            sample_ids=tuple(self.ids[int(sample)] for sample in samples),
            instruction_ids=np.concatenate(instructions),
            instruction_lengths=lengths.astype(np.int32) if lengths.any() else np.empty(0, np.int32),
        )

    def remove(self) -> None:
        del self._tokens, self._mask, self._instruction
        for file in self._files:
            file.unlink()
