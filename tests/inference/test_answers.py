"""Answers of a loaded model: those of `vltrain evaluate`, and log-probabilities and losses of a plain forward; one
interface, every architecture."""

from __future__ import annotations

import json
import shutil
import sys
import threading

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.support.answering_run import KINDS, answering_run, asked
from vltrain.data.images import decode_image
from vltrain.data.loader import batch_of
from vltrain.data.text.conversation import encode_prompt, encode_sample
from vltrain.errors import InputError
from vltrain.inference import load
from vltrain.programs.evaluate import main as evaluate
from vltrain.schema import Turn

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {kind: answering_run(kind, tmp_path_factory.mktemp(kind), eval__max_new_tokens=NEW_TOKENS) for kind in KINDS}


@pytest.fixture(scope="module")
def loaded(runs):
    return {kind: load(run.folder) for kind, run in runs.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_evaluate(kind, runs, loaded):
    run = runs[kind]
    predicted = evaluated(run)
    answers = {one.id: loaded[kind].chat(asked(one), run.paths(one)) for one in run.samples}
    assert {name: answer.text for name, answer in answers.items()} == predicted
    assert len(set(predicted.values())) > 3  # else nothing was compared
    assert all(len(answer.token_ids) == NEW_TOKENS or answer.finished for answer in answers.values())


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_those_of_a_teacher_forced_forward(kind, runs, loaded):
    run, model = runs[kind], loaded[kind]
    for sample in run.samples[:4]:
        answer = model.chat(asked(sample), run.paths(sample))
        prompt = encode_prompt(sample, model._tokenizer, run.config.data.template, model._model.visual_tokens)
        ids = np.concatenate([prompt.input_ids, np.array(answer.token_ids, np.int32)])
        mask = np.arange(len(ids)) >= len(prompt.input_ids)
        names = dict.fromkeys(prompt.images)
        images = {
            name: decode_image((run.images / name).read_bytes(), model._model.image_size, 10**6, name) for name in names
        }
        heard = []
        head = model._model.llm.lm_head.register_forward_hook(
            lambda module, inputs, output: heard.append((inputs[0].detach(), inputs[1], output[1].detach()))
        )
        with torch.no_grad():
            model._model(
                batch_of(
                    [type(prompt)(**{**vars(prompt), "input_ids": ids, "loss_mask": mask})],
                    images,
                    model._reader,
                )
            )
        head.remove()
        hidden, labels, _ = heard[0]
        plain = (hidden @ model._model.llm.lm_head.weight.T).log_softmax(-1)[torch.arange(len(labels)), labels]
        assert labels.tolist() == answer.token_ids
        assert answer.logprobs == pytest.approx(plain.tolist(), abs=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_training_of_each_sample_by_itself(kind, runs, loaded):
    run, model = runs[kind], loaded[kind]
    expected = []
    for sample in run.samples:
        segment = encode_sample(sample, model._tokenizer, run.config.data.template, model._model.visual_tokens)
        images = {
            name: decode_image((run.images / name).read_bytes(), model._model.image_size, 10**6, name)
            for name in sample.images
        }
        model._model.train()  # as a training step calls it; nothing here has dropout
        try:
            expected.append(
                float(model._model(batch_of([segment], images, model._reader)).loss_sum.detach())
                / int(segment.loss_mask.sum())
            )
        finally:
            model._model.eval()
    assert model.loss(run.images / "test.jsonl") == pytest.approx(expected, rel=1e-5)
    assert model.loss(run.samples, folder=run.images) == model.loss(
        [one.to_json() for one in run.samples], folder=run.images
    )
    assert len(set(np.round(expected, 3))) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_stream_pieces_join_to_the_answer(kind, runs, loaded):
    run, model = runs[kind], loaded[kind]
    for sample in run.samples:
        seen = []
        stream = model.stream(
            asked(sample), run.paths(sample), on_token=lambda token, logprob: seen.append((token, logprob))
        )
        pieces = list(stream)
        answer = model.chat(asked(sample), run.paths(sample))
        assert "".join(pieces) == answer.text == "".join(answer.tokens) and stream.answer() == answer
        assert seen == list(zip(answer.token_ids, answer.logprobs)) and len(answer.tokens) == len(answer.token_ids)
        assert answer.text == model._tokenizer.decode(answer.token_ids).strip()


def test_every_kind_of_image_is_the_same_one(runs, loaded):
    run, model = runs["mmt"], loaded["mmt"]
    sample = next(one for one in run.samples if len(one.images) == 1)
    path = run.paths(sample)[0]
    opened = Image.open(path)
    first, *others = [
        model.chat(asked(sample), [kind])
        for kind in (path, str(path), path.read_bytes(), opened, np.asarray(opened), opened.convert("RGBA"))
    ]
    assert all(other == first for other in others)
    assert model.ask([path], sample.turns[0].text.removeprefix("<image>\n")) == first
    other = model.chat(asked(sample), [255 - np.asarray(opened)])
    assert other.logprobs != first.logprobs


def test_images_stand_in_the_order_of_their_places(runs, loaded):
    run, model = runs["mmt"], loaded["mmt"]
    sample = next(one for one in run.samples if len(one.images) == 2)
    there, back = (model.chat(asked(sample), paths) for paths in (run.paths(sample), run.paths(sample)[::-1]))
    assert there.logprobs != back.logprobs


def test_sampling_is_the_recipes_unless_the_caller_says_otherwise(runs, tmp_path):
    run = runs["mmt"]
    warm = answering_run("mmt", tmp_path, eval__max_new_tokens=NEW_TOKENS, eval__temperature=1.5, eval__top_p=0.9)
    greedy, sampled = load(run.folder), load(warm.folder)
    sample = run.samples[0]
    turns, paths = asked(sample), run.paths(sample)
    assert (
        sampled.chat(turns, paths)
        == sampled.chat(turns, paths)
        == sampled.chat(turns, paths, temperature=1.5, top_p=0.9, seed=0)
    )
    assert sampled.chat(turns, paths, seed=1) != sampled.chat(turns, paths)
    assert sampled.chat(turns, paths, temperature=0.0) == greedy.chat(turns, paths)
    assert len(greedy.chat(turns, paths, max_new_tokens=2).token_ids) == 2


def test_a_closed_or_cancelled_stream_ends_the_models_work(runs, loaded, monkeypatch):
    run, model = runs["mmt"], loaded["mmt"]
    sample = max(run.samples, key=lambda one: len(model.chat(asked(one), run.paths(one)).token_ids))
    forwards = []
    hook = model._model.llm.model.register_forward_hook(lambda *_: forwards.append(1))
    stream = model.stream(asked(sample), run.paths(sample))
    next(stream)
    stream.close()
    made = len(forwards)
    assert list(stream) == [] and len(forwards) == made < NEW_TOKENS and not stream.answer().finished
    cancel = threading.Event()
    stream = model.stream(asked(sample), run.paths(sample), cancel=cancel, on_token=lambda *_: cancel.set())
    assert len(forwards) == made and list(stream)
    assert len(stream.answer().token_ids) == 1 and not stream.answer().finished
    hook.remove()


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """A run whose adapters decide by modality, which the model remembers while it computes."""
    return answering_run(
        "mmt",
        tmp_path_factory.mktemp("routed"),
        eval__max_new_tokens=NEW_TOKENS,
        adapter__kind="router",
        adapter__temperature=0.5,
    )


def test_threads_that_ask_at_once_get_their_own_answers(routed):
    run, model = routed, load(routed.folder)
    assert {bool(one.images) for one in run.samples} == {True, False}
    alone = [model.chat(asked(one), run.paths(one)) for one in run.samples]
    together: list = [None] * len(run.samples)

    def ask(number: int) -> None:
        together[number] = model.chat(asked(run.samples[number]), run.paths(run.samples[number]))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(run.samples))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


@pytest.mark.parametrize(
    ("images", "settings", "told"),
    [
        (["none.png"], {}, "none.png: cannot be read"),
        ([b"not an image"], {}, "image 1: not a readable image"),
        ([3], {}, "image 1: found int, expected a path"),
        ([np.zeros((4, 4, 4), np.uint8)], {}, "image 1: found an array of uint8"),
        ([np.zeros((4, 4, 3))], {}, "image 1: found an array of float64"),
        (b"bytes", {}, "expected a list of images"),
        ([np.zeros((8000, 8000), np.uint8)], {}, "more than the allowed 50000000"),
        ([], {"temperature": -1.0}, "eval.temperature: found -1.0"),
        ([], {"temperature": "hot"}, "eval.temperature: found 'hot'"),
        ([], {"top_p": 0.0}, "eval.top_p: found 0.0"),
        ([], {"max_new_tokens": 0}, "eval.max_new_tokens: found 0"),
        ([], {"max_new_tokens": 4096}, "max_new_tokens: found 4096, expected at most"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(images, settings, told, loaded):
    with pytest.raises(InputError, match=told):
        loaded["mmt"].ask(images, "which color is it?", **settings)


def test_turns_that_are_no_question_are_refused(runs, loaded):
    talk = [Turn(role="user", text="a"), Turn(role="assistant", text="b")]
    for turns, told in (
        ([], "found none"),
        (talk, "last turn by 'assistant'"),
        ([Turn(role="user", text=" ")], "empty user turn"),
        ([Turn(role="user", text="<image>")], "1 <image> marker"),
    ):
        with pytest.raises(InputError, match=told):
            loaded["mmt"].chat(turns)
    assert loaded["mmt"].chat([*talk, Turn(role="user", text="c")]).token_ids
    assert loaded["chat"].chat([*talk, Turn(role="user", text="c")]).token_ids
    for kind in ("llama", "t5"):
        run = runs[kind]
        with pytest.raises(InputError, match="does not support conversations"):
            loaded[kind].chat(
                [Turn(role="user", text="<image>\na"), talk[1], Turn(role="user", text="c")],
                run.paths(run.samples[0])[:1],
            )
        with pytest.raises(InputError, match="needs an image"):
            loaded[kind].ask([], "a")
    with pytest.raises(InputError, match="the question: has .* positions"):
        loaded["mmt"].ask([], "which color " * 90)


def evaluated(run, *words: str) -> dict[str, str]:
    assert evaluate([str(run.folder), "--split", "test", *words]) == 0
    lines = (run.folder / "eval" / "test" / "predictions.jsonl").read_text().splitlines()
    return {record["id"]: record["prediction"] for record in map(json.loads, lines)}


def test_bits_are_those_of_evaluate(runs):
    run = runs["mmt"]
    model = load(run.folder, bits=4)
    linear = model._model.llm.model.layers[0].mlp.up_proj
    assert type(linear).__name__ == "Nf4Linear" and model.facts["changed_settings"] == ["model.bits"]
    assert {one.id: model.chat(asked(one), run.paths(one)).text for one in run.samples} == evaluated(
        run, "--bits", "4", "--eval.batch_size", "1"
    )


def test_bits_whose_package_is_missing_are_refused(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="bitsandbytes"):
        load(runs["mmt"].folder, bits=4)


def test_an_evaluation_in_fp32_of_a_run_in_bf16_is_asked_in_fp32(tmp_path):
    run = answering_run(
        "mmt", tmp_path, eval__max_new_tokens=NEW_TOKENS, eval__precision="fp32", train__precision="bf16"
    )
    model = load(run.folder)
    assert model.dtype == torch.float32 and model._model.llm.model.embed_tokens.weight.dtype == torch.float32
    assert {one.id: model.chat(asked(one), run.paths(one)).text for one in run.samples} == evaluated(run)


def test_kernels_that_this_machine_lacks_hinder_no_answer(runs, tmp_path, caplog):
    run = runs["mmt"]
    shutil.copytree(run.folder, tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    recipe = yaml.safe_load(file.read_text())
    recipe["model"]["llm"] |= {"attention": "flash_attention_2", "kernels": "liger"}
    recipe["model"]["adapter"]["impl"] = "triton"
    file.write_text(yaml.safe_dump(recipe))
    with caplog.at_level("INFO"):
        model = load(tmp_path / "run", device="cpu")
    assert "model.llm.attention: the run's recipe says flash_attention_2" in caplog.text
    sample = run.samples[0]
    assert (
        model.chat(asked(sample), run.paths(sample)).token_ids
        == load(run.folder).chat(asked(sample), run.paths(sample)).token_ids
    )


def test_routed_adapters_and_the_untuned_model_answer_by_turns(routed):
    """Each has decided for itself, and the tuned model answers as before when the other has."""
    run = routed
    model, before = load(run.folder, keep_untuned=True), load(run.folder, checkpoint="none")
    assert {one.id: model.chat(asked(one), run.paths(one)).text for one in run.samples} == evaluated(run)
    parameters, draw = dict(before._model.named_parameters()), torch.Generator().manual_seed(2)
    with torch.no_grad():  # fresh adapters add nothing, whatever is decided
        for name, kept in model._untuned.items():
            parameters[name].copy_(kept.add_(torch.randn(kept.shape, generator=draw) * 0.3))
    before._decide()
    for sample in run.samples[:3]:
        tuned = model.chat(asked(sample), run.paths(sample))
        with model.untuned():
            assert (
                model.chat(asked(sample), run.paths(sample)) == before.chat(asked(sample), run.paths(sample)) != tuned
            )
        assert model.chat(asked(sample), run.paths(sample)) == tuned


def test_questions_are_put_as_the_training_put_them(runs, tmp_path):
    run = runs["mmt"]
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(
        json.dumps(
            {"data": {"asked": {"begin": "question : ", "end": " short answer :", "multi_turn": False, "images": True}}}
        )
    )
    model, plain, path = load(tmp_path / "run"), load(run.folder), run.images / "one.png"
    put = plain.chat([Turn(role="user", text="<image>\nquestion : what color ? short answer :")], [path])
    assert (
        model.ask([path], "what color ?") == model.ask([path], "<image>\nquestion : what color ? short answer :") == put
    )
    assert model.ask([path], "what color ?", as_is=True) == plain.ask([path], "what color ?") != put
