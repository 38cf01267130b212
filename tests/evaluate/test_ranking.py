"""Ranked candidates against a plain loop over single candidates, against the loss that training computes, and with a
model made up."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_generate import IMAGES, MODEL, VOCABULARY, Rank, plain_hidden_states, tiny_model

from tests.support.reading import ranked, squares
from vltrain.data.loader import collate
from vltrain.data.text.conversation import encode_prompt, encode_sample
from vltrain.errors import InputError
from vltrain.evaluate.answering.candidates import RowCandidates
from vltrain.evaluate.answering.decoding import alone
from vltrain.evaluate.answering.ranking import CandidateLosses, RankingItem, rank, to_item
from vltrain.models.mmt.model import MultimodalModel
from vltrain.schema import PackedRow, Sample, Turn

LETTERS = "abcdefgh"


class Letters:
    """A tokenizer of one token per letter."""

    bos_id, eos_id, word_prefix, vocab_size = 1, 2, "", VOCABULARY

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) % (VOCABULARY - 3) for letter in text]


TOKENIZER = Letters()


def make_sample(number: int, rng: np.random.Generator, rest: str = "") -> Sample:
    """No, one or two images, two to five candidates of unlike lengths; the answer is the right one and `rest`."""
    names = tuple(map(str, rng.choice(sorted(IMAGES), size=number % 3)))
    candidates = [
        f"({letter}) " + "".join(rng.choice(list("xyzuv"), rng.integers(0, 6)))
        for letter in LETTERS[: rng.integers(2, 6)]
    ]
    answer = int(rng.integers(len(candidates)))
    asked = "<image>\n" * len(names) + "".join(rng.choice(list("pqrst "), rng.integers(1, 20)))
    turns = (Turn(role="user", text=asked), Turn(role="assistant", text=candidates[answer] + rest))
    return Sample(id=f"s{number}", turns=turns, images=names, metadata={"candidates": candidates, "answer": answer})


RNG = np.random.default_rng(0)
SAMPLES = [make_sample(number, RNG) for number in range(24)]
ITEMS = [to_item(sample, "file") for sample in SAMPLES]


def candidates_of(model: MultimodalModel, load_image=IMAGES.__getitem__) -> RowCandidates:
    return RowCandidates(**ranked(model, TOKENIZER, "mmt", load_image))


@torch.no_grad()
def plain_losses(model: MultimodalModel, item: RankingItem) -> list[tuple[float, int]]:
    """(summed loss, tokens) of each candidate, one by one, from all logits in float64."""
    prompt = encode_prompt(item.sample, TOKENIZER, "mmt", model.visual_tokens).input_ids.tolist()
    visual = torch.empty(0, model.visual_tokens, 32)
    if item.sample.images:
        visual = model.encode_images(torch.from_numpy(np.stack([IMAGES[name] for name in item.sample.images])))
    losses = []
    for text in item.candidates:
        answer = TOKENIZER.encode(text) + [TOKENIZER.eos_id] * item.whole
        embeds = model.embed(torch.tensor(prompt + answer), visual, torch.arange(len(item.sample.images)))
        log_likelihoods = model.llm.lm_head(plain_hidden_states(model, embeds)).double().log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) - 1 + len(answer))
        losses.append((-float(log_likelihoods[list(places), answer].sum()), len(answer)))
    return losses


@functools.cache
def plain_item_losses() -> list[list[tuple[float, int]]]:
    """The plain loop's, of all items."""
    return [plain_losses(MODEL, item) for item in ITEMS]


@functools.cache
def plain_winners() -> list[int]:
    return [min(range(len(losses)), key=lambda place: losses[place][0]) for losses in plain_item_losses()]


def flat(losses: list[list[tuple[float, int]]]) -> tuple[list[float], list[int]]:
    rows = [row for of_item in losses for row in of_item]
    return [loss for loss, _ in rows], [count for _, count in rows]


def test_the_reference_is_worth_comparing_with():
    """Winners differ, the shortest candidate does not always win, and images matter."""
    assert len(set(plain_winners())) >= 4
    per_token = [
        min(range(len(losses)), key=lambda place: losses[place][0] / losses[place][1]) for losses in plain_item_losses()
    ]
    assert sum(one != other for one, other in zip(per_token, plain_winners())) >= 3
    assert any(
        losses[winner][1] > min(count for _, count in losses)
        for winner, losses in zip(plain_winners(), plain_item_losses())
    )
    with_image = next(number for number, item in enumerate(ITEMS) if item.sample.images)
    other = candidates_of(MODEL, {name: pixels[::-1].copy() for name, pixels in IMAGES.items()}.__getitem__)
    shown = other.candidate_losses([ITEMS[with_image]], alone).loss_sums.tolist()
    assert max(abs(one - loss) for one, (loss, _) in zip(shown, plain_item_losses()[with_image])) > 1e-3


@pytest.mark.parametrize("whole", [True, False])
def test_losses_of_a_padded_batch_equal_the_plain_loops(whole):
    items = [replace(item, whole=whole) for item in ITEMS]
    found = candidates_of(MODEL).candidate_losses(items, alone)
    sums, counts = flat(plain_item_losses() if whole else [plain_losses(MODEL, item) for item in items])
    assert found.num_tokens.tolist() == counts
    torch.testing.assert_close(found.loss_sums.double(), torch.tensor(sums, dtype=torch.float64), rtol=2e-6, atol=2e-5)


def test_losses_equal_those_of_training_on_a_packed_row():
    """Each candidate as a sample of its own that is trained on, all in one pack."""
    chosen = ITEMS[:6]
    answered = [
        replace(item.sample, turns=(item.sample.turns[0], Turn(role="assistant", text=text)))
        for item in chosen
        for text in item.candidates
    ]
    segments = [encode_sample(sample, TOKENIZER, "mmt", MODEL.visual_tokens) for sample in answered]
    names = sorted({name for segment in segments for name in segment.images})
    row = PackedRow(
        input_ids=np.concatenate([segment.input_ids for segment in segments]),
        loss_mask=np.concatenate([segment.loss_mask for segment in segments]),
        segment_lengths=np.array([len(segment.input_ids) for segment in segments], np.int32),
        image_ids=np.arange(len(names)),
        image_slots=np.array([names.index(name) for segment in segments for name in segment.images], np.int32),
        sample_ids=tuple(segment.sample_id for segment in segments),
    )
    with torch.no_grad():
        trained = MODEL(collate(row, [IMAGES[name] for name in names], squares(MODEL))).segment_losses
    torch.testing.assert_close(
        candidates_of(MODEL).candidate_losses(chosen, alone).loss_sums, trained, rtol=2e-6, atol=2e-5
    )


@pytest.mark.parametrize("batch_size", [1, 7, 16, 1000])
def test_winners_are_the_plain_loops_at_any_batch_size(batch_size):
    assert rank(candidates_of(MODEL), ITEMS, batch_size=batch_size) == plain_winners()


def test_winners_do_not_depend_on_neighbours_or_their_order():
    shuffled = np.random.default_rng(3).permutation(len(ITEMS))[:9]
    assert rank(candidates_of(MODEL), [ITEMS[number] for number in shuffled], batch_size=11) == [
        plain_winners()[number] for number in shuffled
    ]


@pytest.mark.parametrize("batch_size", [1, 16])
def test_routed_adapters_rank_as_they_were_trained(batch_size):
    model = tiny_model(
        kind="router", temperature=0.5
    ).double()  # in fp32 these adapters would enlarge its rounding to 1e-3 of a loss
    with torch.no_grad():
        for name, parameter in model.llm.named_parameters():
            if ".adapter." in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    plain = [plain_losses(model, item) for item in ITEMS[:9]]
    found = candidates_of(model).candidate_losses(ITEMS[:9], alone)
    torch.testing.assert_close(
        found.loss_sums.double(), torch.tensor(flat(plain)[0], dtype=torch.float64), rtol=1e-9, atol=1e-9
    )
    expected = [min(range(len(losses)), key=lambda place: losses[place][0]) for losses in plain]
    assert rank(candidates_of(model), ITEMS[:9], batch_size=batch_size) == expected


class MadeUp:
    """A `CandidateModel` that is told each candidate's loss, and takes one token for each letter."""

    def __init__(self, losses: dict[str, float]) -> None:
        self.losses, self.batches = losses, []

    def candidate_losses(self, items: Sequence[RankingItem], sync) -> CandidateLosses:
        self.batches.append([item.sample.id for item in items])
        texts = [text for item in items for text in item.candidates]
        return CandidateLosses(
            torch.tensor([self.losses[text] for text in texts]), torch.tensor([len(text) for text in texts])
        )


def item(name: str, *candidates: str) -> RankingItem:
    turns = (Turn(role="user", text="q"), Turn(role="assistant", text=candidates[0]))
    return RankingItem(sample=Sample(id=name, turns=turns), candidates=candidates, whole=True)


def test_the_lowest_sum_wins_and_of_equal_ones_the_first():
    model = MadeUp({"a": 3.0, "b": 2.0, "cccc": 2.0, "d": 4.0})
    items = [item("1", "a", "b", "cccc"), item("2", "cccc", "b"), item("3", "d", "a"), item("4", "a", "d")]
    assert rank(model, items, batch_size=8) == [1, 0, 1, 0]
    assert rank(model, items, batch_size=8, normalise_length=True) == [2, 0, 1, 0]


def test_batches_hold_whole_items_and_no_more_rows_than_allowed():
    model = MadeUp(dict.fromkeys("abcde", 1.0))
    counts: list[int] = []
    items = [item(str(number), *"abcde"[: 2 + number % 4]) for number in range(9)]
    assert rank(model, items, batch_size=6, on_answered=counts.append) == [0] * 9
    rows = {one.sample.id: len(one.candidates) for one in items}
    assert sorted(name for batch in model.batches for name in batch) == sorted(rows)
    assert (
        all(sum(rows[name] for name in batch) <= 6 for batch in model.batches)
        and [len(batch) for batch in model.batches] == counts
    )
    assert rank(model, items[:2], batch_size=1) == [0, 0] and rank(model, [], batch_size=4) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_name_their_sample(value):
    with pytest.raises(InputError, match="'second'.*not finite"):
        rank(MadeUp({"a": 1.0, "b": value}), [item("first", "a"), item("second", "a", "b")], batch_size=8)


@pytest.mark.parametrize(
    "shares", [(slice(0, 20), slice(20, 24)), (slice(0, 5), slice(0, 0)), (slice(0, 0), slice(0, 0))]
)
def test_ranks_that_sync_make_the_same_forwards_and_the_winners_stay(shares):
    barrier, values = threading.Barrier(2), [0, 0]
    ranks = [Rank(barrier, values, number) for number in range(2)]
    models = [tiny_model(), tiny_model()]
    for one, model in zip(ranks, models):
        for name in ("vision", "neck", "modality_embedding", "llm.model", "llm.lm_head"):
            model.get_submodule(name).register_forward_pre_hook(
                lambda module, arguments, one=one, name=name: one.calls.append(name)
            )
    winners: list = [None, None]

    def work(number: int) -> None:
        winners[number] = rank(
            candidates_of(models[number]), ITEMS[shares[number]], batch_size=8, sync=ranks[number].sync
        )

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert winners == [plain_winners()[share] for share in shares]
    assert ranks[0].calls == ranks[1].calls
    assert ("vision" in ranks[0].calls) == bool(ITEMS[shares[0]])


def test_an_answer_that_goes_on_after_its_candidate_is_ranked_by_its_beginning():
    sample = make_sample(1, np.random.default_rng(5), rest=" BECAUSE")
    assert not to_item(sample, "file").whole and to_item(SAMPLES[0], "file").whole


@pytest.mark.parametrize(
    ("metadata", "part"),
    [
        ({}, "candidates: found none, so it cannot be answered by ranking; use eval.method generate"),
        ({"candidates": [], "answer": 0}, "candidates: found none"),
        ({"candidates": ["x"], "answer": 0}, "expected two or more"),
        ({"candidates": ["x", " "], "answer": 0}, "expected two or more"),
        ({"candidates": ["x", "x"], "answer": 0}, "expected different ones"),
        ({"candidates": ["x", "y"], "answer": 2}, "answer: found 2, expected 0 to 1"),
        ({"candidates": ["x", "y"], "answer": "x"}, "answer: found 'x'"),
        ({"candidates": ["x", "y"], "answer": 1}, "does not begin with its right candidate 'y'"),
    ],
)
def test_samples_that_cannot_be_ranked_name_file_id_and_key(metadata, part):
    sample = Sample(id="7", turns=(Turn(role="user", text="q"), Turn(role="assistant", text="x")), metadata=metadata)
    with pytest.raises(InputError) as caught:
        to_item(sample, "samples.jsonl")
    assert str(caught.value).startswith("samples.jsonl: sample '7': ") and part in str(caught.value)
