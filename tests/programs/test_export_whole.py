"""`vltrain export --format whole`: stock transformers answers questions with the folder as it is, as we do."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, InstructBlipForConditionalGeneration

from tests.support.blip import LLAMA, SIZES, T5, blip_config, make_tokenizers
from tests.support.peft_folders import moved, save_run
from tests.support.reading import pictures
from vltrain.data.images import decode_image
from vltrain.data.text.conversation import encode_prompt, stop_ids
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.data.text.tokenizer_sources import tokenizer_sources
from vltrain.evaluate.answering.decoding import Sampling
from vltrain.evaluate.answering.generate import generate
from vltrain.models.build import build_model
from vltrain.programs.export import export
from vltrain.schema import Sample, Turn

QUESTIONS = ("which color is the circle ?", "how many are there", "question : what shape ? short answer :")
NEW = 6


def picture(number):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (30 + number, 40, 3), dtype=np.uint8))


def our_answers(model, config):
    tokenizer = load_tokenizer(*tokenizer_sources(config))
    samples = [
        Sample(
            id=str(number),
            images=(str(number),),
            turns=(Turn(role="user", text=f"<image>\n{text}"), Turn(role="assistant", text="red")),
        )
        for number, text in enumerate(QUESTIONS)
    ]

    def load(name):
        file = io.BytesIO()
        picture(int(name)).save(file, "PNG")
        return decode_image(file.getvalue(), model.image_size, 10**6, name)

    prompts = [encode_prompt(sample, tokenizer, model.template, model.visual_tokens) for sample in samples]
    ends = stop_ids(tokenizer, model.template)
    answers = generate(
        model.eval(),
        prompts,
        pictures(model, load),
        sampling=Sampling(max_new_tokens=NEW),
        stop_ids=ends,
        vocab_size=tokenizer.vocab_size,
        batch_size=2,
        device="cpu",
    )
    return answers, tokenizer.vocab_size


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("rows", ["to spare", "full"])
def test_stock_transformers_answers_as_we_do(kind, rows, tmp_path):
    places = make_tokenizers(tmp_path / "tokenizers")
    text = dict(LLAMA if kind == "llama" else T5)
    if rows == "full":
        text["vocab_size"] = load_tokenizer(places[kind]).vocab_size
    config = blip_config(kind, places, config={**SIZES, "text_config": text}, qformer__mode="lora", llm__mode="lora")
    model = moved(build_model(config.model))
    save_run(tmp_path / "run", config, model)
    export(tmp_path / "run", tmp_path / "whole", "whole", proof_samples=None)
    expected, known = our_answers(model, config)
    processor = AutoProcessor.from_pretrained(tmp_path / "whole")
    stock = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "whole").eval()
    assert stock.config.image_token_id == known == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert stock.config.text_config.vocab_size == (known + 1 if rows == "full" else text["vocab_size"])
    beyond = (
        {"suppress_tokens": list(range(known, text["vocab_size"]))} if rows == "to spare" else {}
    )  # of random weights they are as likely as others
    for number, question in enumerate(QUESTIONS):
        asked = processor(images=picture(number), text=question, return_tensors="pt")
        with torch.no_grad():
            found = stock.generate(**asked, max_new_tokens=NEW, do_sample=False, **beyond)[0].tolist()
        answer = found[asked["input_ids"].shape[1] :] if kind == "llama" else found[1:]
        end = stock.config.text_config.eos_token_id
        assert (answer[: answer.index(end)] if end in answer else answer) == expected[number]
    assert len({tuple(answer) for answer in expected}) > 1, "the answers tell pictures and questions apart"
