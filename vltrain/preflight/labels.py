"""What is predicted, shown: of some samples the label tokens as text, as the model is given them."""

from __future__ import annotations

import numpy as np

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
        labels, start = batch.labels.numpy(), 0
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
            found.append(Finding(status=FAILED if wrong else OK, what=f"labels of '{segment.sample_id}'", found=told))
            start += length
    return found[:SHOWN]


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
