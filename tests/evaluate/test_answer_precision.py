"""`eval.precision: fp32`: a model that trains in bf16 answers the same at every batch size, as an fp32 model of the
same numbers does."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.evaluate.test_generate import MODEL, make_prompts, run
from tests.evaluate.test_qformer_answers import picture
from tests.models.test_qformer import KINDS, tokenizer_of
from tests.support.blip import blip_config, make_samples, make_tokenizers
from tests.support.reading import pictures, ranked
from vltrain.config.command_line import load_settings
from vltrain.config.recipe import build_config
from vltrain.data.text.conversation import encode_prompt, stop_ids
from vltrain.errors import InputError
from vltrain.evaluate.answering.candidates import SegmentCandidates
from vltrain.evaluate.answering.decoding import Sampling
from vltrain.evaluate.answering.generate import generate
from vltrain.evaluate.answering.precision import loaded_dtype, products_in_fp32
from vltrain.evaluate.answering.ranking import RankingItem, rank
from vltrain.models.build import build_model
from vltrain.programs.train import _require_widenable

SIZES = (1, 3, 64)
IN_BF16 = torch.autocast("cpu", dtype=torch.bfloat16)


def halved(model):
    """A copy as training in bf16 has it: what is frozen in bf16. And one with the same numbers in fp32."""
    half = copy.deepcopy(model).float().eval()
    for parameter in half.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return half, copy.deepcopy(half).float()


def dtypes_of_products(model, answer):
    """The dtypes that the linear layers gave while `answer` ran, and what it returned."""
    seen = set()
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        return answer(), seen
    finally:
        for hook in hooks:
            hook.remove()


def test_a_multimodal_model_answers_the_same_at_every_batch_size():
    half, whole = halved(MODEL)
    prompts = make_prompts(40, seed=3)
    expected = run(prompts, 7, model=whole)
    kept = {name: (parameter.dtype, parameter.data_ptr()) for name, parameter in half.named_parameters()}
    with IN_BF16:
        _, seen = dtypes_of_products(half, lambda: run(prompts[:2], 2, model=half))
        assert seen == {torch.bfloat16}
        with products_in_fp32(half, "cpu"):
            for size in SIZES:
                answers, seen = dtypes_of_products(half, lambda: run(prompts, size, model=half))
                assert answers == expected and seen == {torch.float32}
        assert {name: (parameter.dtype, parameter.data_ptr()) for name, parameter in half.named_parameters()} == kept
        assert dtypes_of_products(half, lambda: run(prompts[:2], 2, model=half))[1] == {torch.bfloat16}
    assert len(set(map(tuple, expected))) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_an_instructblip_generates_and_ranks_the_same_at_every_batch_size(kind, tmp_path):
    places = make_tokenizers(tmp_path)
    model, tokenizer = build_model(blip_config(kind, qformer__mode="lora").model), tokenizer_of(kind, places)
    with torch.no_grad():
        for parameter in (one for one in model.parameters() if one.ndim > 1):
            parameter.mul_(4)
    half, whole = halved(model)
    samples = make_samples(24, seed=5)
    prompts = [encode_prompt(sample, tokenizer, model.template, model.visual_tokens) for sample in samples]
    settings = {
        "sampling": Sampling(max_new_tokens=6),
        "stop_ids": stop_ids(tokenizer, model.template),
        "vocab_size": 64,
        "device": "cpu",
    }
    choices = ("( a ) red", "( b ) blue circle", "( c ) 2", "star")
    items = [
        RankingItem(sample=sample, candidates=choices[: 2 + number % 3], whole=True)
        for number, sample in enumerate(samples)
    ]

    def answers(of, size):
        candidates = SegmentCandidates(**ranked(of, tokenizer, of.template, picture))
        return generate(of, prompts, pictures(of, picture), batch_size=size, **settings), rank(
            candidates, items, batch_size=size
        )

    expected = answers(whole, 5)
    with IN_BF16, products_in_fp32(half, "cpu"):
        for size in SIZES:
            assert answers(half, size) == expected
    assert len(set(map(tuple, expected[0]))) > 4 and len(set(expected[1])) > 1


def test_the_log_says_in_what_answers_are_computed(caplog):
    asked = {"train.precision": "bf16", "eval.precision": "fp32"}
    with caplog.at_level("INFO"):
        assert loaded_dtype(build_config(asked)) == torch.bfloat16
        assert loaded_dtype(build_config({"train.precision": "bf16"})) == torch.bfloat16
    assert [one.getMessage() for one in caplog.records] == ["precision of answers: torch.float32 (eval.precision fp32)"]


def test_weights_are_given_back_after_an_error():
    half, _ = halved(MODEL)
    with pytest.raises(InputError), products_in_fp32(half, "cpu"):
        raise InputError("on the way")
    assert any(parameter.dtype == torch.bfloat16 for parameter in half.parameters())
    assert half.llm.config._attn_implementation == MODEL.llm.config._attn_implementation


def test_what_cannot_be_widened_or_has_no_effect_is_refused():
    with pytest.raises(InputError, match="LLM.int8"):
        build_config({"model.bits": 8, "eval.precision": "fp32"})
    with pytest.raises(InputError, match="eval.precision: has no effect"):
        load_settings(["--train.precision", "fp32", "--eval.precision", "fp32"], program="test")
    asked = {"train.precision": "bf16", "eval.precision": "fp32"}
    with pytest.raises(InputError, match="ZeRO-3"):
        _require_widenable(build_config(asked), 3)
    _require_widenable(build_config(asked), 2)
    _require_widenable(build_config({**asked, "model.bits": 32}), 3)
