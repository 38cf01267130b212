"""Generation through a vision-language model's own forward, with its cache and the positions of its family.

Prompts of a batch are padded on the left, as transformers' generation has them: several families are silently wrong
with padding on the right, since what decides their masks (windows, blocks of an image's tokens) counts columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vltrain.batch import tensor_of
from vltrain.evaluate.answering.decoding import CACHE_ARGUMENT, Decoder
from vltrain.schema import Segment


class WholeModelDecoder(Decoder):
    """One batch of prompts, padded on the left to L tokens. `model` is a `StockModel`.

    input_ids  int64 [B, L]
    given      int64 [R, B, L], positions of the prompts' tokens, R rows as the family counts them
    positions  int64 [R, B], of the row's next token
    mask       int64 [B, L + max_new_tokens], which columns of the cache hold real tokens
    """

    model: Any

    def _lay_out(self, prompts: list[Segment]) -> None:
        ids = [prompt.input_ids for prompt in prompts] or [np.zeros(1, np.int32)]
        positions = [_positions(prompt) for prompt in prompts] or [np.zeros((1, 1), np.int64)]
        blocks = [
            prompt.blocks if len(prompt.blocks) else np.full(len(prompt.input_ids), -1) for prompt in prompts
        ] or [np.full(1, -1)]
        lengths = torch.tensor([len(row) for row in ids])
        num_rows, width = len(ids), int(lengths.max())
        self.input_ids = torch.zeros(num_rows, width, dtype=torch.int64)
        self.blocks = torch.full((num_rows, width), -1)
        self.given = torch.zeros(len(positions[0]), num_rows, width, dtype=torch.int64)
        for row, length in enumerate(map(len, ids)):
            self.input_ids[row, width - length :] = tensor_of(ids[row].astype(np.int64))
            self.blocks[row, width - length :] = tensor_of(blocks[row].astype(np.int64))
            self.given[:, row, width - length :] = tensor_of(positions[row].astype(np.int64))
        mask = torch.ones(num_rows, width + self.sampling.max_new_tokens, dtype=torch.int64)
        mask[:, :width] = torch.arange(width) >= width - lengths[:, None]
        self.mask = mask.to(self.device)
        self.positions = _following(self.given).to(self.device)

    def _prefill(self) -> Tensor:
        input_ids, blocks = self.input_ids.to(self.device), self.blocks.to(self.device)
        return self._logits(
            input_ids,
            self.given.to(self.device),
            self.visual,
            self.slots,
            **self.model.token_types(input_ids, blocks),
        )

    def _decode(self, tokens: Tensor) -> Tensor:
        logits = self._logits(tokens[:, None], self.positions[..., None], None, self.slots[:0])
        self.positions = self.positions + 1
        return logits

    def _logits(self, input_ids: Tensor, positions: Tensor, visual: Any, slots: Tensor, **arguments: Tensor) -> Tensor:
        """What follows the last of `input_ids` [B, N] in each row: [B, rows of the head]."""
        seen = self.cache.get_seq_length() + input_ids.shape[1]
        states = self.model.read(
            input_ids,
            visual,
            slots,
            position_ids=positions[0] if len(positions) == 1 else positions,
            attention_mask=self.mask[:, :seen],
            use_cache=True,
            **{CACHE_ARGUMENT: self.cache},
            **arguments,
        )
        return self.model.llm.lm_head(states[:, -1])

    def _select(self, places: Tensor) -> None:
        self.mask, self.positions = self.mask[places], self.positions[:, places]


def _positions(prompt: Segment) -> np.ndarray:
    """int [R, L]."""
    return prompt.position_ids if prompt.position_ids.size else np.arange(len(prompt.input_ids))[None]


def _following(positions: Tensor) -> Tensor:
    """Where the next token stands, [R, B] of [R, B, L]: behind all that its row has seen. Of four rows the first counts
    tokens, the others are the axes of images, of which the largest counts."""
    furthest = positions.amax(dim=-1)
    if len(furthest) == 1:
        return furthest + 1
    axes = furthest[1:] if len(furthest) == 4 else furthest
    following = axes.amax(dim=0).expand(len(furthest), -1).clone()
    if len(furthest) == 4:
        following[0] = furthest[0]
    return following + 1
