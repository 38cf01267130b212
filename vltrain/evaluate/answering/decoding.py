"""One batch of prompts from prefill to its last token: how tokens are chosen, and what a decoder-only LLM or an
encoder-decoder computes for them.

Prompts are padded on the right, where causality hides the padding during prefill, and the padding's keys are masked
while decoding (on the left where the LLM's attention has sliding windows, and masked there); rotary positions count
real tokens only.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, LlamaModel

from vltrain.batch import listed, tensor_of
from vltrain.errors import InputError
from vltrain.models.interface import VisionLanguageModel
from vltrain.schema import IMAGE_MODALITY_TOKEN, TEXT_MODALITY_TOKEN, Segment

Sync = Callable[[int], int]
UNIT = (
    2**53
)  # what a probability of 1 is as a whole number: as fine as doubles near 1, and a sum of them has room in an int64
# What transformers calls the cache that a LLaMA is given: another word since 5.24, where the old one warns at every
# call.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy; else from the smallest set of tokens whose probability reaches
    `top_p`."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Token(NamedTuple):
    """One token that a model wrote.

    prompt: which of the prompts it answers; logprob: the natural logarithm of its probability among all rows of the
    LLM's head, at temperature 1, fp32; NaN where it was not asked for; ends: it is a stop id, and no part of the
    answer.
    """

    prompt: int
    id: int
    logprob: float
    ends: bool


def alone(value: int) -> int:
    """The `sync` of ranks that need not keep step with each other."""
    return value


class Decoder:
    """One batch from prefill to its last token. B rows of the cache, L the longest prompt; rows leave as they finish.

    Where adapters are routed, a prompt's modality token has decided already (`decide_routing`) and is left out of its
    row.

    rows       for each row of the cache, which prompt it answers
    modality   int64 [B], 0 text or 1 image
    positions  int64 [B], the position of the row's next token: real tokens so far, the one left out included
    mask       int64 [B, L + max_new_tokens], which columns of the cache hold real tokens
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        prompts: list[Segment],
        visual: Any,
        slots: Tensor,
        sampling: Sampling,
        stop_ids: Collection[int],
        vocab_size: int,
        device: torch.device,
        *,
        with_logprobs: bool = False,
    ) -> None:
        self.with_logprobs = with_logprobs
        self.model, self.sampling, self.stop_ids, self.vocab_size, self.device = (
            model,
            sampling,
            stop_ids,
            vocab_size,
            device,
        )
        self.sample_ids = [prompt.sample_id for prompt in prompts]
        self.visual, self.slots = visual, slots
        self.cache = DynamicCache(config=model.llm.config)
        self.rows = list(range(len(prompts)))
        self._lay_out(prompts)
        if sampling.temperature > 0:
            self.uniforms = torch.tensor([_uniforms(sampling, name) for name in self.sample_ids], dtype=torch.float64)

    def _lay_out(self, prompts: list[Segment]) -> None:
        """The prompts as rows of one batch."""
        ids = [prompt.input_ids for prompt in prompts] or [np.array([TEXT_MODALITY_TOKEN, 0])]
        self.modality = torch.tensor([int(row[0] == IMAGE_MODALITY_TOKEN) for row in ids], device=self.device)
        self.num_left_out = 0 if self.model.routing is None else 1
        ids = [row[self.num_left_out :] for row in ids]
        lengths = torch.tensor([len(row) for row in ids])
        width = int(lengths.max())
        # Where attention counts columns back from a token, none may lie between a prompt and its answer.
        self.pads_left = getattr(self.model.llm.config, "sliding_window", None) is not None
        starts = width - lengths if self.pads_left else torch.zeros_like(lengths)
        self.input_ids = torch.zeros(len(ids), width, dtype=torch.int64)
        for row, (start, tokens) in enumerate(zip(listed(starts), ids)):
            self.input_ids[row, start : start + len(tokens)] = tensor_of(tokens.astype(np.int64))
        self.starts, self.last = starts.to(self.device), (starts + lengths - 1).to(self.device)
        self.positions = (lengths + self.num_left_out).to(self.device)
        mask = torch.ones(len(ids), width + self.sampling.max_new_tokens, dtype=torch.int64)
        columns = torch.arange(width) - starts[:, None]
        mask[:, :width] = (columns >= 0) & (columns < lengths[:, None])
        self.mask = mask.to(self.device)

    def tokens(self, sync: Sync) -> Iterator[list[Token]]:
        """Step by step, the next token of each prompt whose answer has not ended. All ranks make the same forwards if
        `sync` speaks for all of them."""
        live = set(self.rows)
        logits = self._prefill()
        for step in range(self.sampling.max_new_tokens):
            tokens = self._choose(logits[:, : self.vocab_size], step)
            logprobs = _logprobs(logits, tokens) if self.with_logprobs else [math.nan] * len(tokens)
            made = [
                Token(prompt, token, logprob, token in self.stop_ids)
                for prompt, token, logprob in zip(self.rows, listed(tokens), logprobs) if prompt in live
            ]  # fmt: skip
            live -= {token.prompt for token in made if token.ends}
            yield made
            if step + 1 == self.sampling.max_new_tokens or not sync(len(live)):
                return
            logits = self._decode(self._keep(live, tokens))

    def _prefill(self) -> Tensor:
        """Runs the whole prompts. Returns the logits [B, rows of the head] that follow each prompt's last token."""
        num_rows, width = self.input_ids.shape
        embeds = self.model.embed(self.input_ids.flatten().to(self.device), self.visual, self.slots).view(
            num_rows, width, -1
        )
        positions = self.num_left_out + (torch.arange(width, device=self.device) - self.starts[:, None]).clamp(min=0)
        padding = {"attention_mask": self.mask[:, :width]} if self.pads_left else {}
        outputs = self.model.language_model(
            embeds, self.modality, position_ids=positions, use_cache=True, **padding, **{CACHE_ARGUMENT: self.cache}
        )
        last = outputs.last_hidden_state[torch.arange(num_rows, device=self.device), self.last]
        return self.model.llm.lm_head(last)

    def _decode(self, tokens: Tensor) -> Tensor:
        """Runs one more token per row, int64 [B]. Returns the logits [B, rows of the head] that follow it."""
        embeds = self.model.embed(tokens, self.visual[:0], self.slots[:0])[:, None]
        outputs = self.model.language_model(
            embeds,
            self.modality,
            position_ids=self.positions[:, None],
            attention_mask=self.mask[:, : self.cache.get_seq_length() + 1],
            use_cache=True,
            **{CACHE_ARGUMENT: self.cache},
        )
        self.positions = self.positions + 1
        return self.model.llm.lm_head(outputs.last_hidden_state[:, 0])

    def _keep(self, live: set[int], tokens: Tensor) -> Tensor:
        """Drops finished rows once they are half of the batch. One row stays for the forwards that other ranks still
        need."""
        if 2 * len(live) > len(self.rows) or len(tokens) == 1:
            return tokens
        kept = [row for row, prompt in enumerate(self.rows) if prompt in live] or [0]
        self.rows = [self.rows[row] for row in kept]
        places = torch.tensor(kept, device=self.device)
        self.cache.batch_select_indices(places)
        self._select(places)
        return tokens[places]

    def _select(self, places: Tensor) -> None:
        """Drops all rows but those at `places`, of what a decoder keeps beside its cache."""
        self.mask, self.positions, self.modality = self.mask[places], self.positions[places], self.modality[places]

    def _choose(self, logits: Tensor, step: int) -> Tensor:
        """The next token of every row, int64 [B]."""
        finite = listed(torch.isfinite(logits).all(dim=-1))
        for prompt, is_finite in zip(self.rows, finite):
            if not is_finite:
                name = self.sample_ids[prompt]
                raise InputError(
                    f"sample '{name}': the model's outputs are not finite; the weights have diverged or do not "
                    "fit the dtype"
                )
        if self.sampling.temperature == 0 or not self.rows:
            return logits.argmax(dim=-1)
        uniforms = self.uniforms[self.rows, step].to(self.device)
        return sample_tokens(logits, uniforms, self.sampling.temperature, self.sampling.top_p)


class EncoderDecoder(Decoder):
    """One batch under an encoder-decoder: the encoder reads the prompts, the cache holds what the decoder wrote and
    what it sees of them."""

    def _prefill(self) -> Tensor:
        num_rows, width = self.input_ids.shape
        embeds = self.model.embed(self.input_ids.flatten().to(self.device), self.visual, self.slots).view(
            num_rows, width, -1
        )
        self.is_read = self.mask[:, :width]
        self.encoded = self.model.llm.encoder(inputs_embeds=embeds, attention_mask=self.is_read).last_hidden_state
        self.cache = EncoderDecoderCache(
            DynamicCache(config=self.model.llm.config), DynamicCache(config=self.model.llm.config)
        )
        return self._decode(self.model.shifted(torch.zeros(num_rows, 1, dtype=torch.int64, device=self.device))[:, 0])

    def _decode(self, tokens: Tensor) -> Tensor:
        arguments = {"use_cache": True, CACHE_ARGUMENT: self.cache}
        states = self.model.decoder_states(tokens[:, None], self.encoded, self.is_read, **arguments)
        return self.model.llm.lm_head(states[:, 0])

    def _keep(self, live: set[int], tokens: Tensor) -> Tensor:
        return tokens  # all rows stay: answers are short beside the prompts, which are read once


def _logprobs(logits: Tensor, tokens: Tensor) -> list[float]:
    """Of the token int64 [B] in each row of `logits` [B, rows of the head]."""
    wide = logits.float()
    return listed(wide.gather(-1, tokens[:, None]).squeeze(-1) - wide.logsumexp(dim=-1))


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751) by inverting the cumulative
    distribution.

    Args:
        logits: [B, vocabulary].
        uniforms: float64 [B] in [0, 1), the randomness.
        temperature: positive.
        top_p: the kept tokens are the fewest most probable ones whose probabilities sum to at least this.

    Returns: int64 [B].
    """
    probabilities, tokens = (logits.double() / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    # Summed as whole numbers of UNIT, exact in any order: on CUDA a cumulative sum of floats differs from call to call.
    shares = (probabilities * UNIT).round().long()
    cumulative = shares.cumsum(dim=-1)
    kept = cumulative - shares < math.ceil(top_p * UNIT)  # the first token always is
    total = (shares * kept).sum(dim=-1, keepdim=True)
    chosen = torch.searchsorted(cumulative, (uniforms[:, None] * total).floor().long(), right=True)
    chosen = chosen.clamp(max=kept.sum(dim=-1, keepdim=True) - 1)  # a product rounded up to the total itself
    return tokens.gather(-1, chosen).squeeze(-1)


def _uniforms(sampling: Sampling, sample_id: str) -> list[float]:
    """One uniform number per new token, from (seed, sample id) alone."""
    digest = hashlib.sha256(f"{sampling.seed}:{sample_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).random(sampling.max_new_tokens).tolist()
