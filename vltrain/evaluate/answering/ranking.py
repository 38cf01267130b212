"""Multiple choice by ranking: the candidate answer that the model finds likeliest, without generating a token.

For each candidate of a question the model tells the negative log-likelihood of its text after the prompt, summed over
its tokens; the lowest wins, and of equal ones the first. Summed, short candidates have an advantage over long ones;
with `normalise_length` each sum is divided by its number of tokens. Every question has candidates of its own, and
neither its neighbours in a batch nor the number of ranks decide an answer: what remains is rounding, as in
`vltrain.evaluate.answering.generate`.

Any model can be ranked with that implements `CandidateModel`; `vltrain.evaluate.answering.candidates` does for
ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from vltrain.batch import listed
from vltrain.errors import InputError
from vltrain.evaluate.answering.decoding import Sync, alone
from vltrain.evaluate.scorers.choices import needs_choices
from vltrain.evaluate.scorers.question import question_of
from vltrain.schema import Sample


@dataclass(frozen=True, kw_only=True)
class RankingItem:
    """A question to be answered by one of its candidates.

    sample      all turns but the last are the prompt, `<image>` markers included; the last one is the right answer, not
                to be looked at
    candidates  texts that can stand in the last turn's place, two or more, all different, in the order of the choices
    whole       each candidate is a whole answer, so whatever ends an answer (EOS) belongs to it; else it is the
                beginning of one
    """

    sample: Sample
    candidates: tuple[str, ...]
    whole: bool


class CandidateLosses(NamedTuple):
    """R rows: the candidates of all items, item by item, each item's in its own order.

    loss_sums   float [R], on any device: summed negative log-likelihood (natural log) of the candidate's tokens, given
                the prompt
    num_tokens  int64 [R]: how many tokens that sum is over, with the ones that end the answer where `whole`
    """

    loss_sums: Tensor
    num_tokens: Tensor


class CandidateModel(Protocol):
    """What ranking needs of a model."""

    def candidate_losses(self, items: Sequence[RankingItem], sync: Sync) -> CandidateLosses:
        """The losses of all candidates of one batch of items, without gradients, in the caller's autocast context.

        A row must not depend on the other rows of the batch. Prompts and images may be encoded once and shared by an
        item's candidates.

        Args:
            items: at most some tens of rows in all; none at all where only other ranks have something to do. Then a
                model whose forwards are collectives (ZeRO-3) makes the same ones on something empty, and R is 0.
            sync: the largest of a whole number over all ranks, to agree on which forwards are made (has any rank an
                image?). Every rank calls it equally often, also with no items; where ranks need not keep step it
                returns its argument.

        Raises: InputError for what is wrong with a sample or its images, naming it.
        """
        ...


def to_item(sample: Sample, where: str) -> RankingItem:
    """What is to be ranked of a sample of the file `where`, from its metadata (see `vltrain.evaluate.scorers.choices`).

    Raises: InputError if it has no candidates, or if its answer is not the one that the metadata calls right, or does
    not begin with it.
    """
    question = question_of(sample, where)
    if not question.metadata.get("candidates"):
        raise InputError(
            f"{question.where}: candidates: found none, so it cannot be answered by ranking; use eval.method generate"
        )
    candidates, answer = needs_choices(question)
    return RankingItem(sample=sample, candidates=tuple(candidates), whole=question.reference == candidates[answer])


def rank(
    model: CandidateModel,
    items: Sequence[RankingItem],
    *,
    batch_size: int,
    normalise_length: bool = False,
    sync: Sync = alone,
    on_answered: Callable[[int], object] = lambda count: None,
) -> list[int]:
    """The number of the winning candidate of each item, in the items' order.

    Args:
        batch_size: candidates scored at once, except that an item is never divided.
        normalise_length: compare losses per token instead of sums.
        sync: see `CandidateModel`; under ZeRO-3 every rank must call `rank` with it.
        on_answered: told how many items each finished batch held.

    Raises: InputError if a loss is not finite, naming the sample, and whatever the model raises.
    """
    batches = list(_batches(items, batch_size))
    batches += [[]] * (sync(len(batches)) - len(batches))
    winners = [-1] * len(items)
    for numbers in batches:
        asked = [items[number] for number in numbers]
        losses = model.candidate_losses(asked, sync)
        num_rows = sum(len(item.candidates) for item in asked)
        assert losses.loss_sums.shape == losses.num_tokens.shape == (num_rows,), f"{losses} for {num_rows} candidates"
        values = losses.loss_sums.double()
        rows = iter(listed(values / losses.num_tokens.to(values.device) if normalise_length else values))
        for number, item in zip(numbers, asked):
            own = [next(rows) for _ in item.candidates]
            if not all(abs(loss) < float("inf") for loss in own):  # nor is NaN
                name = item.sample.id
                raise InputError(
                    f"sample '{name}': the model's losses are not finite; the weights have diverged or do not "
                    "fit the dtype"
                )
            winners[number] = own.index(min(own))
        on_answered(len(asked))
    return winners


def _batches(items: Sequence[RankingItem], batch_size: int) -> Iterator[list[int]]:
    """Numbers of items: similar lengths together, so that padding is small, and those about one image, so that it is
    encoded once."""
    lengths = [
        sum(len(turn.text) for turn in item.sample.turns[:-1]) + max(map(len, item.candidates)) for item in items
    ]
    batch: list[int] = []
    num_rows = 0
    for number in sorted(range(len(items)), key=lambda number: (lengths[number], items[number].sample.images)):
        if batch and num_rows + len(items[number].candidates) > batch_size:
            yield batch
            batch, num_rows = [], 0
        batch.append(number)
        num_rows += len(items[number].candidates)
    if batch:
        yield batch
