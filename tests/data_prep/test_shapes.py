"""Shapes: the same from the same seed, splits apart, and every answer checked against what is on the picture."""

import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data_prep.prepare import prepare
from data_prep.sources import shapes
from data_prep.sources.shapes import COLORS, PLURALS, RELATIONS, SHAPES, SKILLS, Figure
from vltrain.errors import InputError
from vltrain.evaluate.answering.ranking import to_item

SMALL = {"train_images": 150, "val_images": 20, "test_images": 20}


def read(**options):
    return list(shapes.read(None, {**SMALL, **options}))


RAW = read()


def test_the_same_seed_gives_the_same_set_and_another_another():
    assert read() == RAW and read(seed=1) != RAW
    assert RAW[0].image_sources[0]() == read()[0].image_sources[0]()


def test_no_image_of_one_split_is_in_another():
    pictures = {
        split: {raw.image_sources[0]() for raw in RAW if raw.split == split} for split in ("train", "val", "test")
    }
    assert {split: len(found) for split, found in pictures.items()} == {"train": 150, "val": 20, "test": 20}
    assert len(set.union(*pictures.values())) == 190


def test_ids_are_unique_and_every_question_can_be_ranked():
    assert len({raw.sample.id for raw in RAW}) == len(RAW)
    assert all(to_item(raw.sample, "x").whole for raw in RAW)
    by_image = Counter(raw.sample.images for raw in RAW)
    assert max(by_image.values()) == 4 and len({(raw.sample.images, raw.sample.turns[0].text) for raw in RAW}) == len(
        RAW
    )


def test_a_plain_answer_needs_no_list_of_choices_in_its_prompt():
    for raw, listed in zip(read(choices="plain", prompt="{question}"), RAW):
        (user, assistant), facts = raw.sample.turns, listed.sample.metadata
        assert user.text == listed.sample.turns[0].text.partition(" Options:")[0].replace("Question: ", "")
        assert assistant.text == facts["choices"][facts["answer"]]


def relation(figure: Figure, other: Figure) -> str:
    """By the larger of the two distances; y grows downwards."""
    across, down = figure.x - other.x, figure.y - other.y
    return ("left of" if across < 0 else "right of") if abs(across) > abs(down) else ("above" if down < 0 else "below")


def answer_by_looking(question: str, figures: tuple[Figure, ...]) -> str:
    """Answers a question from the scene, by its text alone."""
    kinds = {PLURALS.get(name, name + "s"): number for number, name in enumerate(SHAPES)}
    words = question.rstrip("?.").split()
    if question.startswith("How many"):
        kind = " ".join(words[2:-2])
        color = kind.removesuffix(" shapes")
        return str(
            sum(
                kind == "shapes" or kinds.get(kind) == figure.shape or color == COLORS[figure.color]
                for figure in figures
            )
        )
    if question.startswith("Which color"):
        (figure,) = [figure for figure in figures if SHAPES[figure.shape] == words[-1]]
        return COLORS[figure.color]
    if question.startswith("Which shape"):
        (figure,) = [figure for figure in figures if COLORS[figure.color] == words[-1]]
        return SHAPES[figure.shape]
    asked, other = question.removeprefix("Where is the ").rstrip(".").split("? It is (_) the ")
    (one,), (two,) = ([figure for figure in figures if figure.name == name] for name in (asked, other))
    return relation(one, two)


def test_every_answer_is_what_the_scene_shows():
    for raw in RAW:
        text = raw.sample.turns[0].text.removeprefix("<image>\nQuestion: ").partition(" Options:")[0]
        facts = raw.sample.metadata
        assert facts["choices"][facts["answer"]] == answer_by_looking(text, raw.image_sources[0].figures)
        assert 2 <= len(facts["choices"]) == len(set(facts["choices"])) <= 4


def test_the_picture_shows_each_figure_in_its_colour_at_its_place():
    for scene in list(dict.fromkeys(raw.image_sources[0] for raw in RAW))[:60]:
        pixels = np.asarray(Image.open(io.BytesIO(scene()))).astype(int)
        assert pixels.shape == (64, 64, 3)
        for figure in scene.figures:
            x, y = int(figure.x * 64), int(figure.y * 64)
            assert abs(pixels[y, x] - figure.ink).max() <= 2, figure
        drawn = (np.abs(pixels - scene.ground).max(axis=-1) > 60).sum()
        assert 0.25 < drawn / sum(np.pi * (figure.radius * 64) ** 2 for figure in scene.figures) < 1.25


def test_questions_cannot_be_answered_by_their_text_alone():
    """No place, no word and no number is right much more often than chance."""
    raws = read(train_images=1200, val_images=0, test_images=0)
    facts = [raw.sample.metadata for raw in raws]
    chance = np.mean([1 / len(one["choices"]) for one in facts])
    for place in range(4):
        offered = [one["answer"] == place for one in facts if len(one["choices"]) > place]
        expected = np.mean([1 / len(one["choices"]) for one in facts if len(one["choices"]) > place])
        assert abs(np.mean(offered) - expected) < 0.03
    by_skill = {skill: [one for one in facts if one["skills"] == [skill]] for skill in SKILLS}
    assert all(len(found) > 500 for found in by_skill.values())
    for word in (*COLORS, *SHAPES, *RELATIONS):
        offered = [one["choices"][one["answer"]] == word for one in facts if word in one["choices"]]
        assert abs(np.mean(offered) - chance) < 0.12, word
    counting = [
        sorted(map(int, one["choices"])).index(int(one["choices"][one["answer"]])) for one in by_skill["counting"]
    ]
    assert counting.count(0) / len(counting) < 0.55


def test_prepared_in_one_process_and_in_two(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.parallel.ALONE_SECONDS", 0.0)
    options = {"train_images": 80, "val_images": 5, "test_images": 5, "image_size": 32, "skills": "counting,position"}
    counts = prepare("shapes", None, tmp_path / "one", options, workers=1)
    assert counts == prepare("shapes", None, tmp_path / "two", options, workers=2)
    for path in sorted((tmp_path / "one").rglob("*.*")):
        if path.match("*.stats.npy"):  # times and inodes
            continue
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    record = json.loads((tmp_path / "one" / "train.jsonl").read_text().splitlines()[0])
    assert Image.open(tmp_path / "one" / record["images"][0]).size == (32, 32)
    assert set(record["metadata"]["skills"]) <= {"counting", "position"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"train_images": -1}, "'train_images': found -1, expected a number in [0, "),
        ({"image_size": 8}, "'image_size': found 8"),
        ({"skills": "counting,colour"}, "unknown 'colour'"),
        ({"train_image": 5}, "did you mean 'train_images'"),
        ({"prompt": "{question}"}, "'prompt'"),
    ],
)
def test_mistakes_are_named(options, named):
    with pytest.raises(InputError) as caught:
        list(shapes.read(None, options))
    assert named in str(caught.value)


def test_an_input_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected no --input"):
        list(shapes.read(tmp_path, {}))
