"""The tiny pretrained models and the package that makes them: what they know, and that their text and drawings tell the
truth."""

import re

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM

from data_prep.pretrain.__main__ import main
from data_prep.pretrain.drawings import COLOURS, FIGURES, draw
from data_prep.pretrain.llama import accuracy, tokenise
from data_prep.pretrain.sentences import KINDS, Lesson, Writer
from data_prep.pretrain.vit import VIT_CONFIG, Drawings, draw_many, states
from vltrain.config.model.mmt import MmtConfig
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.files.locate import locate
from vltrain.models.build import build_model

EASY_VQA_WORDS = (
    "circle rectangle triangle red green blue yellow black gray teal brown yes no shape color image "
    "what is the in does contain present there not a of"
).split()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("asset://tiny_llama")


@pytest.fixture(scope="module")
def llama():
    return LlamaForCausalLM.from_pretrained(locate("asset://tiny_llama"), dtype=torch.float32)


def readable_share(vit: CLIPVisionModel, train: Drawings, test: Drawings, name: str, num_classes: int) -> float:
    """Accuracy on `test` of a ridge regression from [cls] behind all blocks, fitted on `train`."""
    with torch.no_grad():
        known, asked = (
            torch.cat([state[:, 0] for state in states(vit, drawings.pixels)], dim=1).double()
            for drawings in (train, test)
        )
    mean, deviation = known.mean(0), known.std(0) + 1e-6
    known, asked = ((features - mean) / deviation for features in (known, asked))
    targets = torch.nn.functional.one_hot(getattr(train, name), num_classes).double()
    weights = torch.linalg.solve(
        known.T @ known + 10.0 * torch.eye(known.shape[1], dtype=torch.float64), known.T @ (targets - targets.mean(0))
    )
    return ((asked @ weights + targets.mean(0)).argmax(1) == getattr(test, name)).double().mean().item()


def test_default_model_is_built_from_the_shipped_weights(tokenizer):
    model = build_model(MmtConfig())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    adapter = 128 * 16 + 16 + 16 * 128 // 2 + 128
    neck = 2 * (128 * 128 + 128)
    assert trained == (4 + 3) * adapter + neck + 2 * 128
    assert (model.visual_tokens, model.image_size) == (4, 64)
    assert model.llm.config.vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize("word", EASY_VQA_WORDS)
def test_each_word_of_easy_vqa_is_one_token(tokenizer, word):
    ids = tokenizer.encode(word)
    assert len(ids) == 1
    assert tokenizer.decode(ids) == word


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ("Question: what shape is in the image?\nAnswer:", "Ünïcode 你好 🙂 and 123.5", "a  b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_vit_tells_figures_and_colours_apart_where_a_random_one_does_not():
    vit = CLIPVisionModel.from_pretrained(locate("asset://tiny_vit"), dtype=torch.float32)
    torch.manual_seed(0)
    untrained = CLIPVisionModel(CLIPVisionConfig(**VIT_CONFIG))
    rng = np.random.default_rng(20_000)
    train, test = draw_many(rng, 1500), draw_many(rng, 500)
    assert readable_share(vit, train, test, "colour", len(COLOURS)) > 0.9
    assert readable_share(vit, train, test, "figure", len(FIGURES)) > 0.7
    assert readable_share(untrained, train, test, "figure", len(FIGURES)) < 0.5


def test_llama_answers_new_questions_about_scenes_in_words(llama, tokenizer):
    writer = Writer(seed=20_000)
    lessons = [lesson for lesson in (writer.lesson() for _ in range(600)) if " " not in lesson.answer]
    assert accuracy(llama, [tokenise(lesson, tokenizer) for lesson in lessons], noise=None) > 0.9
    # Without its scene a question about one can only be guessed.
    blind = [
        Lesson(scene="a scene", question=lesson.question, answer=lesson.answer)
        for lesson in lessons
        if lesson.scene is not None
    ]
    assert accuracy(llama, [tokenise(lesson, tokenizer) for lesson in blind], noise=None) < 0.6


def test_a_drawing_shows_its_figure_where_its_mask_says():
    for seed in range(50):
        drawing = draw(np.random.default_rng(seed), variety=0.0)  # hard edges, plain ground
        inside = drawing.pixels[:, drawing.mask].T
        ground = drawing.pixels[:, 0, 0]
        assert 0.02 < drawing.mask.mean() < 0.6
        same_ink = (inside == np.median(inside, axis=0)).all(axis=1)
        assert same_ink.mean() > 0.9
        assert np.abs(drawing.pixels[:, ~drawing.mask].T - ground.astype(int)).any(axis=1).mean() < 0.02


def test_drawings_and_lessons_follow_their_seed():
    first, again, other = (draw(np.random.default_rng(seed)).pixels for seed in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    told, again, other = ([writer.lesson() for _ in range(3)] for writer in map(Writer, (3, 3, 4)))
    assert told == again != other


def test_yes_and_no_are_the_truth():
    """Questions for one noun, in the plainest form, against the words of the scene itself."""
    nouns = {noun for kind in KINDS.values() for noun in kind}
    writer, checked = Writer(seed=5), {"yes": 0, "no": 0}
    for _ in range(5000):
        lesson = writer.lesson()
        asked = re.fullmatch(r"is there (an?|no|not an?) (\w+)( in the \w+)?\?", lesson.question.lower())
        if asked and asked[2] in nouns:
            there = asked[2] in re.findall(r"\w+", lesson.scene)
            assert lesson.answer == ("yes" if there != asked[1].startswith("no") else "no"), lesson
            checked[lesson.answer] += 1
    assert min(checked.values()) > 30


def test_checklists_are_the_truth():
    writer, checked = Writer(seed=6), 0
    for _ in range(1000):
        lesson = writer.lesson()
        if lesson.scene and " " in lesson.answer:
            words = lesson.answer.split()
            for word, verdict in zip(words[::2], words[1::2], strict=True):
                assert verdict == ("yes" if word in re.findall(r"\w+", lesson.scene) else "no"), lesson
                checked += 1
    assert checked > 500


def test_a_lesson_is_read_as_the_tuned_model_will_read_it(tokenizer):
    row = tokenise(Lesson(scene="red circle", question="what color is it?", answer="red"), tokenizer)
    assert row.ids[0] == tokenizer.bos_id and row.ids[-1] == tokenizer.eos_id
    assert list(row.ids[row.scene]) == tokenizer.encode("red circle")
    assert list(row.ids[row.answer]) == [*tokenizer.encode("red"), tokenizer.eos_id]
    assert (
        tokenizer.decode(list(row.ids)).split() == "Image: red circle Question: what color is it? Answer: red".split()
    )


def test_the_assets_can_be_made_again(tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--vit-steps", "2", "--llama-steps", "2"]
    assert main(arguments) == 0
    assert load_tokenizer(str(tmp_path / "tiny_llama")).fingerprint == load_tokenizer("asset://tiny_llama").fingerprint
    CLIPVisionModel.from_pretrained(tmp_path / "tiny_vit")
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
