"""Candidate answers under a model of ours: its LLM's loss on each, for `vltrain.evaluate.answering.ranking`.

As segments of one batch, candidates have the losses of the training's forward. Or each candidate is a row of its own:
the prompt, tokenised as in training, and the candidate in the answer's place. Rows are padded on the right, where
causality hides the padding, and only the candidates' positions go through the head. Trade-off: candidates do not share
their prompt's keys and values, which would save computing and cost the plain forward that training, too, goes through.
Images are encoded once a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from vltrain.batch import tensor_of
from vltrain.data.loader import batch_of, filler
from vltrain.data.pictures import Pictures
from vltrain.data.text.encoder import SampleEncoder, SizeOf
from vltrain.evaluate.answering.decoding import Sync
from vltrain.evaluate.answering.generate import DECODING_THREADS, encode_together
from vltrain.evaluate.answering.ranking import CandidateLosses, RankingItem
from vltrain.models.interface import VisionLanguageModel
from vltrain.ops.rows import segment_sums
from vltrain.schema import IMAGE_MODALITY_TOKEN, TEXT_MODALITY_TOKEN, Segment


@dataclass(kw_only=True)
class RowCandidates:
    """A `CandidateModel`: each candidate is a padded row. Making one is a collective under ZeRO-3, where adapters are
    routed: they decide then.

    model     in evaluation mode, plain or under DeepSpeed at any stage
    pictures  of the samples' images; size_of: how large those are
    """

    model: VisionLanguageModel
    encoder: SampleEncoder
    pictures: Pictures
    size_of: SizeOf
    device: torch.device | str

    def __post_init__(self) -> None:
        assert not self.model.training, "ranking with a model in training mode"
        self.model.decide_routing()

    @torch.no_grad()
    def candidate_losses(self, items: Sequence[RankingItem], sync: Sync) -> CandidateLosses:
        """See `CandidateModel`."""
        rows = _rows_of(items, self.encoder, self.size_of)
        images = _images_of(items, self.pictures)
        visual, slots = encode_together(self.model, rows, images, self.pictures.reader, self.device, sync)
        input_ids, labelled, modality, left_out = self._pad(rows)
        num_rows, width = input_ids.shape
        embeds = self.model.embed(input_ids.flatten(), visual, slots).view(num_rows, width, -1)
        positions = (left_out + torch.arange(width, device=self.device)).expand(num_rows, width)
        hidden = self.model.language_model(embeds, modality, position_ids=positions, use_cache=False).last_hidden_state
        row, place = labelled.nonzero(as_tuple=True)  # place - 1 predicts the token at place
        _, token_losses = self.model.llm.lm_head(hidden[row, place - 1], input_ids[row, place])
        sums = segment_sums(token_losses, row, num_rows)
        return CandidateLosses(sums[: len(rows)], labelled.sum(dim=1)[: len(rows)])

    def _pad(self, rows: list[Segment]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """(input_ids int64 [B, L], labelled bool [B, L], modality int64 [B], tokens left out in front); one empty row
        where there are none.

        Where adapters are routed, the modality token has decided already and is left out of its row.
        """
        left_out = 0 if self.model.routing is None else 1
        ids = [tensor_of(row.input_ids).long() for row in rows] or [torch.tensor([TEXT_MODALITY_TOKEN, 0])]
        masks = [tensor_of(row.loss_mask) for row in rows] or [torch.zeros(2, dtype=torch.bool)]
        modality = torch.tensor([int(row[0] == IMAGE_MODALITY_TOKEN) for row in ids])
        padded = [
            torch.nn.utils.rnn.pad_sequence([row[left_out:] for row in part], batch_first=True) for part in (ids, masks)
        ]
        input_ids, labelled, modality = (tensor.to(self.device) for tensor in (*padded, modality))
        return input_ids, labelled, modality, left_out


@dataclass(kw_only=True)
class SegmentCandidates:
    """A `CandidateModel`: candidates are segments of one batch, and go through the training's forward.

    model     in evaluation mode, plain or under DeepSpeed at any stage
    pictures  of the samples' images; size_of: how large those are
    """

    model: VisionLanguageModel
    encoder: SampleEncoder
    pictures: Pictures
    size_of: SizeOf
    device: torch.device | str

    def __post_init__(self) -> None:
        assert not self.model.training, "ranking with a model in training mode"

    @torch.no_grad()
    def candidate_losses(self, items: Sequence[RankingItem], sync: Sync) -> CandidateLosses:
        """See `CandidateModel`."""
        rows = _rows_of(items, self.encoder, self.size_of)
        images = _images_of(items, self.pictures)
        anyone_has_images, reader = bool(sync(int(len(images) > 0))), self.pictures.reader
        batch = batch_of(rows, images, reader, blank=anyone_has_images) if rows else filler(anyone_has_images, reader)
        losses = self.model(batch.to(self.device)).segment_losses
        return CandidateLosses(losses[: len(rows)], batch.label_lengths[: len(rows)])


CANDIDATES: dict[str, type[RowCandidates] | type[SegmentCandidates]] = {
    "rows": RowCandidates,
    "segments": SegmentCandidates,
}
"""By `VisionLanguageModel.ranks`."""


def _rows_of(items: Sequence[RankingItem], encoder: SampleEncoder, size_of: SizeOf) -> list[Segment]:
    """A row per candidate, item after item."""
    return [encoder.candidate(item.sample, text, item.whole, size_of) for item in items for text in item.candidates]


def _images_of(items: Sequence[RankingItem], pictures: Pictures) -> dict[str, np.ndarray]:
    """Each image that the items show, once, by name."""
    names = dict.fromkeys(name for item in items for name in item.sample.images)
    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        return dict(zip(names, pool.map(pictures.load, names)))
