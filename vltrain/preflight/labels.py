"""What is predicted, shown: of some samples the label tokens as text, as the model is given them; and whether it is
given their images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vltrain.batch import Batch, ImageInputs
from vltrain.data.loader import load_pack
from vltrain.data.report.finding import FAILED, OK, Finding
from vltrain.data.text.tokenizer import Tokenizer
from vltrain.preflight.samples import segments_of
from vltrain.schema import IGNORE_INDEX
from vltrain.train.trainer import Trainer

SHOWN, LONGEST = 3, 80  # samples, and characters of a text


def label_masks(trainer: Trainer, tokenizer: Tokenizer) -> list[Finding]:
    """A line a sample, from packs evenly spread over all."""
    loader, model = trainer.loader, trainer.engine.model
    dataset, found = loader.dataset, list[Finding]()
    for pack in np.unique(np.linspace(0, len(dataset) - 1, SHOWN).astype(np.int64)).tolist():
        batch = load_pack(dataset, pack, loader.reader, loader.kept)
        labels, start, other_images = batch.labels.numpy(), 0, _other_images(trainer, pack, batch)
        for segment in segments_of(dataset.row(pack), model)[: SHOWN if len(dataset) < SHOWN else 1]:
            length, ids = len(segment.input_ids), segment.input_ids
            own = labels[start : start + length]
            due = np.full(length, IGNORE_INDEX)
            due[:-1] = np.where(segment.loss_mask[1:], ids[1:], IGNORE_INDEX)
            predicts = own != IGNORE_INDEX
            said = _text(own[predicts & (own >= 0)].tolist(), tokenizer)
            read = _text([one for one in ids[: int(predicts.argmax()) + 1].tolist() if one >= 0], tokenizer)
            told = f"predicts {said!r} after {read[-LONGEST:]!r}"
            wrong = (own != due).any()
            if wrong:
                told += ", which is not what the pack says: labels are off the tokens that are to be predicted"
            elif other_images and segment.images:
                wrong, told = True, f"{told}, {other_images}"
            found.append(Finding(status=FAILED if wrong else OK, what=f"labels of '{segment.sample_id}'", found=told))
            start += length
    return found[:SHOWN]


def _other_images(trainer: Trainer, pack: int, batch: Batch) -> str:
    """In words how the images of a loaded pack are others than those that it names, in their order; "" where they are
    these. Each is decoded here once more; kept features have a check of their own when they are made."""
    loader = trainer.loader
    row = loader.dataset.row(pack)
    if batch.image_slots.tolist() != row.image_slots.tolist():
        return "and its images stand in other places than the pack says"
    if loader.kept is not None or not len(row.image_ids):
        return ""
    pictures = [loader.reader.decode(loader.dataset.image(one), f"image {one}") for one in row.image_ids.tolist()]
    due = loader.reader.stack(pictures, row.image_counts.tolist() or [1] * len(pictures))
    pairs = [(batch.pixels, due)]
    if isinstance(batch.pixels, ImageInputs) and isinstance(due, ImageInputs):
        pairs = [(one, due.tensors[name]) for name, one in batch.pixels.tensors.items()]
    same = all(isinstance(one, Tensor) and isinstance(two, Tensor) and torch.equal(one, two) for one, two in pairs)
    return "" if same else "and the model is given other images than the pack's, or in another order"


def _text(ids: list[int], tokenizer: Tokenizer) -> str:
    marks = {tokenizer.bos_id: "", tokenizer.eos_id: "[EOS]"}
    text, run = "", list[int]()
    for one in [*ids, None]:
        if one is None or one in marks:
            text += (tokenizer.decode(run) if run else "") + ("" if one is None else marks[one])
            run = []
        else:
            run.append(one)
    return text
