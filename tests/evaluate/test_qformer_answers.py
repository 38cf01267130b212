"""InstructBLIP's answers: greedy ones equal transformers' generate, ranked ones the training's losses, whatever shares
a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.models.test_qformer import IMAGE_ID, KINDS, reference, tokenizer_of
from tests.support.blip import IMAGE_SIZE, blip_config, make_batch, make_samples, make_tokenizers
from tests.support.reading import pictures, ranked
from vltrain.data.text.conversation import encode_prompt, stop_ids
from vltrain.evaluate.answering.candidates import SegmentCandidates
from vltrain.evaluate.answering.decoding import Sampling, alone
from vltrain.evaluate.answering.generate import generate
from vltrain.evaluate.answering.ranking import RankingItem, rank
from vltrain.models.build import build_model
from vltrain.schema import IMAGE_TOKEN, Sample, Turn


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"))


def picture(name: str) -> np.ndarray:
    return np.random.default_rng(sum(map(ord, name))).integers(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)


def lively(model):
    """Random weights answer every prompt alike; larger ones do not."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.double().eval()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_equal_those_of_transformers(kind, places):
    config = blip_config(kind, vision="full", qformer__mode="full", llm__mode="full")
    model, tokenizer = lively(build_model(config.model)), tokenizer_of(kind, places)
    theirs = reference(model)
    samples = [sample for sample in make_samples(8) if sample.images]
    prompts = [encode_prompt(sample, tokenizer, model.template, model.visual_tokens) for sample in samples]
    settings = {
        "sampling": Sampling(max_new_tokens=6),
        "stop_ids": stop_ids(tokenizer, model.template),
        "vocab_size": IMAGE_ID,
        "device": "cpu",
    }
    answers = generate(model, prompts, pictures(model, picture), batch_size=3, **settings)
    assert answers == generate(model, prompts, pictures(model, picture), batch_size=8, **settings)
    for sample, prompt, answer in zip(samples, prompts, answers):
        ids = torch.from_numpy(prompt.input_ids).long()[None]
        pixels = torch.from_numpy(np.stack([picture(name) for name in sample.images])).double() / 255
        instruction = torch.from_numpy(prompt.instruction_ids).long().expand(len(pixels), -1)
        made = theirs.generate(
            pixel_values=(pixels - model.mean.double()) / model.std.double(), qformer_input_ids=instruction,
            input_ids=torch.where(ids == IMAGE_TOKEN, IMAGE_ID, ids), max_new_tokens=6, do_sample=False, num_beams=1,
            suppress_tokens=[IMAGE_ID], eos_token_id=tokenizer.eos_id, pad_token_id=0,
        )[0].tolist()  # fmt: skip
        made = (
            made[1:]
            if kind == "t5"
            else made[ids.shape[1] :]
            if made[: ids.shape[1]] == torch.where(ids == IMAGE_TOKEN, IMAGE_ID, ids)[0].tolist()
            else made
        )
        made = made[: made.index(tokenizer.eos_id)] if tokenizer.eos_id in made else made
        assert answer == made
    assert len(set(map(tuple, answers))) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_ranking_takes_the_candidate_whose_training_loss_is_least(kind, places):
    model, tokenizer = lively(build_model(blip_config(kind).model)), tokenizer_of(kind, places)
    choices = ("( a ) red", "( b ) blue circle", "( c ) 2", "star")
    samples = make_samples(7, seed=2)
    items = [
        RankingItem(sample=sample, candidates=choices[: 2 + number % 3], whole=True)
        for number, sample in enumerate(samples)
    ]
    candidates = SegmentCandidates(**ranked(model, tokenizer, model.template, picture))
    losses = candidates.candidate_losses(items, alone)
    expected, counts = [], []
    for item in items:
        for text in item.candidates:
            turns = item.sample.turns[0], Turn(role="assistant", text=text)
            batch = make_batch([Sample(id="x", images=item.sample.images, turns=turns)], tokenizer, model.template)
            expected.append(model(batch).segment_losses[0])
            counts.append(batch.num_label_tokens)
    torch.testing.assert_close(losses.loss_sums, torch.stack(expected), rtol=1e-6, atol=1e-6)
    assert losses.num_tokens.tolist() == counts
    winners = rank(candidates, items, batch_size=4)
    assert winners == rank(candidates, items, batch_size=64) and len(set(winners)) > 1


def test_a_rank_with_nothing_to_rank_makes_the_same_forwards(places):
    model, tokenizer = lively(build_model(blip_config("t5").model)), tokenizer_of("t5", places)
    candidates = SegmentCandidates(**ranked(model, tokenizer, model.template, picture))
    ran: list[str] = []
    for name in ("vision", "qformer", "llm.encoder", "llm.decoder", "llm.lm_head"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    losses = candidates.candidate_losses([], lambda value: 1)
    assert len(losses.loss_sums) == len(losses.num_tokens) == 0
    assert ran == ["vision", "qformer", "llm.encoder", "llm.decoder", "llm.lm_head"]
