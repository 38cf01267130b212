"""Tokens of samples: what is remembered of a conversation, and images that are decoded once, change nothing."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from data_prep.packed_images import PackedImages, decoded_before
from data_prep.prepare import MAX_IMAGE_PIXELS, prepare
from data_prep.tokens import _known, _tokenise, pair_of_line
from tests.support.vocabularies import make_metaspace, make_sentencepiece, make_transformers, make_unigram
from vltrain.data.text.encoder import TemplateEncoder
from vltrain.data.text.spelling import NOTHING_LOST, drops_unknown, lost_of
from vltrain.data.text.tokenizer import Tokenizer, load_tokenizer
from vltrain.errors import InputError
from vltrain.files.strict_json import parse_line
from vltrain.schema import Sample, Turn, question_and_answer

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


def spelled(made: dict) -> bytes:
    """As preparing writes it."""
    return (json.dumps(made, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def test_what_is_taken_from_a_line_is_the_sample_that_it_spells():
    draw, taken = random.Random(1), 0
    for text in ('a "b"', "\\", "tab\tünï\n🙂", "<\\image>", "a\u2028b", "}]}", '"}, {"role": "assistant", "text": "'):
        turns = [{"role": "user", "text": f"<image>\n{text}"}, {"role": "assistant", "text": text}]
        made = record(turns=turns, images=["ünï.png"], metadata={"a": [text, 1.5, {}], text: None})
        assert pair_of_line(spelled(made)) == ("1", ("ünï.png",), (turns[0]["text"], text))
    for _ in range(5_000):
        made = mutated(draw)
        line = spelled(made)
        if draw.random() < 0.3:
            place = draw.randrange(len(line))
            line = (
                line[:place] + draw.choice([b'"', b"\\", b"}", b" ", b"\xff", b'{"id": ', b", ", b"NaN"]) + line[place:]
            )
        found = pair_of_line(line)
        if found is not None:
            taken += 1
            sample = Sample.from_json(parse_line(line, "here", 2), "here")
            assert found == (sample.id, sample.images, tuple(turn.text for turn in sample.turns)), line
    assert taken > 100


@pytest.mark.parametrize(
    "metadata",
    [
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        '{"a": 1e999}',
        '{"a": "\\ud800"}',
        '{}, "more": {}',
        "{}}",
        '{"a": "\t"}',
        "{1}",
    ],
)
def test_metadata_is_checked_as_by_reading_all_of_the_line(metadata):
    line = spelled(record()).replace(b'"metadata": {}', f'"metadata": {metadata}'.encode())
    assert pair_of_line(line) is None
    with pytest.raises(InputError):
        Sample.from_json(parse_line(line, "here", 2), "here")


def vocabularies(folder: Path) -> list[Tokenizer]:
    """By pieces, by bytes, with word marks, with an unknown token, and one that drops what it does not know."""
    made = [
        make_sentencepiece(folder / "pieces"), make_transformers(folder / "bytes"), make_unigram(folder / "unigram"),
        make_metaspace(folder / "marks", None), make_metaspace(folder / "drops", None, None),
    ]  # fmt: skip
    return [load_tokenizer(one) for one in ("asset://tiny_llama", *made)]


def test_pairs_have_the_tokens_of_their_samples(tmp_path):
    draw, words = (
        random.Random(0),
        ["red", "blue?", "  two", "ünï", "漢", "🙂", "<\\image>", "</s>", "a\nb", "\t", "it's", "x" * 70],
    )
    texts = [("<image>", "x"), ("a<image>b<image>\n<image>c", " y"), ("a ", "b"), ("<image>\n\n", "\n")]
    for _ in range(200):
        parts = [draw.choice(words) for _ in range(draw.randrange(1, 9))]
        parts.insert(draw.randrange(len(parts)), draw.choice(("<image>\n", "<image>", "x")))
        texts.append((draw.choice(" \n").join(parts), " ".join(draw.choices(words, k=draw.randrange(1, 5)))))
    texts = [(asked, said) for asked, said in texts if asked.strip() and said.strip()]
    for tokenizer in vocabularies(tmp_path):
        for visual_tokens in (1, 5):
            encoder, taken, lossless = TemplateEncoder(tokenizer, "mmt", visual_tokens), 0, 0
            for (asked, said), pair in zip(texts, encoder.pairs(texts), strict=True):
                turns = (Turn(role="user", text=asked), Turn(role="assistant", text=said))
                sample = Sample(id="1", turns=turns, images=("a.png",) * asked.count("<image>"))
                segment = encoder.sample(sample, lambda _: (1, 1))
                lost = lost_of(sample, segment, tokenizer, encoder.stop_ids)
                # of what the template writes, nothing is told that the vocabulary cannot spell
                lossless += lost is NOTHING_LOST and tokenizer.unk_id not in segment.input_ids.tolist()
                if pair is not None:
                    taken += 1
                    assert pair.input_ids == segment.input_ids.tobytes() and lost is NOTHING_LOST, (asked, said)
                    num_given = pair.num_tokens - pair.num_labels
                    assert segment.loss_mask.tolist() == [False] * num_given + [True] * pair.num_labels
            # one without an unknown token leaves out what it does not know: each text has to be looked through
            assert taken == (0 if drops_unknown(tokenizer) else lossless)


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
    read = PackedImages({"": prepared}, 1, MAX_IMAGE_PIXELS, decoded_before(prepared, MAX_IMAGE_PIXELS))
    assert [number for number, _ in read.read([(0, names[0], "0"), (2, names[2], "2")])] == [0, 2]
    with pytest.raises(InputError, match=r"1\.png"):
        list(read.read([(1, names[1], "1")]))


def test_one_that_was_decoded_before_is_not_decoded_again(prepared, monkeypatch):
    monkeypatch.setattr("data_prep.packed_images.is_dark", lambda *_: pytest.fail("decoded"))
    known = decoded_before(prepared, MAX_IMAGE_PIXELS)
    wanted = [(number, name, str(number)) for number, name in enumerate(known)]
    assert len(list(PackedImages({"": prepared}, 1, MAX_IMAGE_PIXELS, known).read(wanted))) == 3
