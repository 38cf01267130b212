"""Every architecture answers over HTTP what its model says, and what it cannot be asked is a mistake of the client."""

from __future__ import annotations

import json

import pytest

from tests.serve.fake import data_url, image_part, png, running, text_part
from tests.support.answering_run import KINDS, answering_run
from tests.support.export_run import stock_run
from vltrain.inference import load
from vltrain.programs.evaluate import main as evaluate


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_model(kind, tmp_path):
    model = load(answering_run(kind, tmp_path, eval__max_new_tokens=8).folder, keep_untuned=True)
    image = png(24, 20, "blue")
    with running(model=model) as server:
        body = server.ask([image_part(data_url(image)), text_part("is it blue?")], logprobs=True).json()
        expected = model.ask([image], "is it blue?")
        assert body["choices"][0]["message"]["content"] == expected.text
        assert [one["logprob"] for one in body["choices"][0]["logprobs"]["content"]] == pytest.approx(
            expected.logprobs, abs=1e-5
        )
        assert body["usage"]["completion_tokens"] == len(expected.token_ids)
        several = [{"role": role, "content": "is it?"} for role in ("user", "assistant", "user")]
        for is_allowed, asked in (
            (not model.needs_image, several[:1]),
            (model.multi_turn and not model.needs_image, several),
        ):
            found = server.post({"model": "fake", "messages": asked})
            assert found.status_code == (200 if is_allowed else 400), found.text
            assert is_allowed or found.json()["error"]["param"] == "messages"
        assert server.client.get("/health").json()["status"] == "ok"


def test_a_stock_model_answers_over_http_as_evaluate_does(tmp_path):
    run = stock_run(tmp_path, "smolvlm")
    assert evaluate([str(run), "--split", "test", "--eval.batch_size", "3"]) == 0
    lines = (run / "eval" / "test" / "predictions.jsonl").read_text().splitlines()
    evaluated = {line["id"]: line["prediction"] for line in map(json.loads, lines)}
    samples = tmp_path / "data" / "samples"
    asked = 0
    with running(model=load(run)) as server:
        for sample in map(json.loads, (samples / "test.jsonl").read_text().splitlines()):
            [first, *more] = sample["turns"][:-1]
            if more or first["role"] != "user" or not first["text"].startswith("<image>"):
                continue
            [image, *others] = [(samples / name).read_bytes() for name in sample["images"]]
            if others:
                continue
            content = [image_part(data_url(image)), text_part(first["text"].removeprefix("<image>").lstrip("\n"))]
            found = server.ask(content, max_tokens=4).json()["choices"][0]["message"]["content"]
            assert found == evaluated[sample["id"]]
            asked += 1
    assert asked
