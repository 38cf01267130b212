"""Tokens of samples: what is remembered of a conversation, and images that are decoded once, change nothing."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from data_prep.packed_images import PackedImages, decoded_before
from data_prep.prepare import MAX_IMAGE_PIXELS, prepare
from data_prep.tokens import _known, _tokenise
from tests.support.vocabularies import make_sentencepiece
from vltrain.data.text.encoder import TemplateEncoder
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.errors import InputError
from vltrain.schema import Sample, question_and_answer

ODD = ["", " ", None, 3, [], {}, "<image>", "\ud800", "../x.png", "/x.png", "system", "assistant", ["a"], True, "\\"]


def record(**changes) -> dict:
    turns = [{"role": "user", "text": "<image>\nwhich?"}, {"role": "assistant", "text": "red"}]
    return {"id": "1", "images": ["a.png"], "turns": turns, "metadata": {}, **changes}


def mutated(draw: random.Random) -> dict:
    """A record with one or two of its values odd, missing, or one too many."""
    made = record()
    for _ in range(draw.choice((1, 1, 2))):
        turns = made.get("turns")
        place = draw.choice([made, *(turns if isinstance(turns, list) else ()), made.get("images")])
        if not isinstance(place, (dict, list)) or not place:
            continue
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        match draw.choice(("odd", "gone", "more")):
            case "odd":
                place[key] = draw.choice(ODD)
            case "gone":
                del place[key]
            case "more" if isinstance(place, dict):
                place["more"] = draw.choice(ODD)
            case _:
                place.append(draw.choice(ODD))
    return made


def test_what_is_taken_without_an_object_is_a_sample():
    draw, taken = random.Random(0), 0
    assert question_and_answer(record()) == ("<image>\nwhich?", "red")
    for _ in range(5_000):
        made = mutated(draw)
        texts = question_and_answer(made)
        if texts is not None:
            taken += 1
            assert tuple(turn.text for turn in Sample.from_json(made, "here").turns) == texts, made
    assert taken > 100


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> TemplateEncoder:
    folder = make_sentencepiece(tmp_path_factory.mktemp("tokens") / "tokenizer")
    return TemplateEncoder(load_tokenizer(folder), "mmt", 4)


def test_a_conversation_that_came_before_is_as_when_it_came_first(encoder, tmp_path):
    """Also one whose tokens lose something: it is counted each time, under its own id."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    rare = [{"role": "user", "text": "what is 漢?"}, {"role": "assistant", "text": "漢"}]
    records = [
        record(), record(id="2", images=["b.png"]), record(id="3", turns=rare, images=[]),
        record(id="4"), record(id="5", turns=rare, images=[]),
    ]  # fmt: skip
    lines = [(number, json.dumps(one).encode()) for number, one in enumerate(records, 1)]
    file = str(tmp_path / "train.jsonl")
    together = _tokenise(lines, file, encoder, 10**6)
    alone = []
    for line in lines:
        _known(encoder).clear()
        alone.append(_tokenise([line], file, encoder, 10**6))
    for name in ("ids", "images", "lengths", "num_labels", "image_tokens"):
        assert getattr(together, name) == [value for one in alone for value in getattr(one, name)], name
    for name in ("input_ids", "loss_mask", "instruction_ids", "position_ids", "blocks"):
        assert getattr(together, name) == b"".join(getattr(one, name) for one in alone), name
    for count in ("unknown", "altered", "prompts"):
        assert together.spelling[count] == sum(one.spelling[count] for one in alone), count
    assert [example[0] for example in together.spelling["examples"]] == [
        example[0] for one in alone for example in one.spelling["examples"]
    ]


@pytest.fixture
def prepared(tmp_path) -> Path:
    raw = tmp_path / "raw"
    (raw / "images").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (40, 40), (number * 40 + 90, 9, 9)).save(raw / "images" / f"{number}.png")
    said = [{"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": str(number), "image": f"images/{number}.png", "conversations": said} for number in range(3)]
    (raw / "talks.json").write_text(json.dumps(records))
    prepare("llava_json", raw / "talks.json", tmp_path / "samples", {"val_fraction": 0.0})
    return tmp_path / "samples"


def test_an_image_that_was_changed_after_it_was_decoded_is_decoded_again(prepared, tmp_path):
    assert not decoded_before(prepared, 10) and len(decoded_before(prepared, MAX_IMAGE_PIXELS)) == 3
    names = sorted(decoded_before(prepared, MAX_IMAGE_PIXELS))
    path = prepared / names[1]
    pixels = path.read_bytes()
    path.unlink()  # it may be a link to the raw one
    path.write_bytes(pixels[: len(pixels) // 2])
    read = PackedImages(prepared, 1, MAX_IMAGE_PIXELS, decoded_before(prepared, MAX_IMAGE_PIXELS))
    assert [number for number, _ in read.read([(0, names[0], "0"), (2, names[2], "2")])] == [0, 2]
    with pytest.raises(InputError, match=r"1\.png"):
        list(read.read([(1, names[1], "1")]))


def test_one_that_was_decoded_before_is_not_decoded_again(prepared, monkeypatch):
    monkeypatch.setattr("data_prep.packed_images.is_dark", lambda *_: pytest.fail("decoded"))
    known = decoded_before(prepared, MAX_IMAGE_PIXELS)
    wanted = [(number, name, str(number)) for number, name in enumerate(known)]
    assert len(list(PackedImages(prepared, 1, MAX_IMAGE_PIXELS, known).read(wanted))) == 3
