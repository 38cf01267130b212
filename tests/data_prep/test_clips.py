"""Clips: the same from the same seed, splits apart, and every answer checked against what its frames show, alone and
together."""

import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data_prep.sources import clips
from vltrain.config.schema import Config, DataConfig, EvalConfig
from vltrain.errors import InputError
from vltrain.evaluate.answering.ranking import to_item
from vltrain.evaluate.ready import answerable_samples
from vltrain.prepared.ensure_data import ensure_samples

SMALL = {"train_clips": 60, "val_clips": 10, "test_clips": 10}


def read(**options):
    return list(clips.read(None, {**SMALL, "questions_per_clip": 4, **options}))


RAW = read()


def test_the_same_seed_gives_the_same_set_and_another_another():
    assert read() == RAW and read(seed=1) != RAW
    assert len(RAW) == 80 * 4 and len({raw.sample.id for raw in RAW}) == len(RAW)
    assert all(to_item(raw.sample, "x").whole for raw in RAW)


def test_no_frame_of_one_split_is_in_another():
    shown = {
        split: {scene for raw in RAW if raw.split == split for scene in raw.image_sources}
        for split in ("train", "val", "test")
    }
    assert sum(map(len, shown.values())) == len(set.union(*shown.values()))


def answer_by_looking(question: str, scenes) -> str:
    """From the frames' figures: when each is first there, and where it is at first and at last."""
    seen: dict[str, list] = {}
    for scene in scenes:
        for figure in scene.figures:
            seen.setdefault(figure.name, []).append(figure)
    ways = {name: (path[-1].x - path[0].x, path[-1].y - path[0].y) for name, path in seen.items()}
    (mover,) = (name for name, way in ways.items() if way != (0, 0))
    if question.startswith("Which way"):
        assert f"the {mover} move" in question
        across, down = ways[mover]
        return ("left" if across < 0 else "right") if abs(across) > abs(down) else ("up" if down < 0 else "down")
    looks = dict(name.split() for name in seen)  # no two figures share a colour or a shape
    if question.startswith("Which color is the "):
        return {shape: color for color, shape in looks.items()}[question.removeprefix("Which color is the ")]
    if question.startswith("Which shape is "):
        return looks[question.removeprefix("Which shape is ")]
    by_frames = sorted(seen, key=lambda name: len(seen[name]))
    assert len({len(path) for path in seen.values()}) == len(seen), "they appear one by one"
    return {"Which moves": mover, "Which appears first": by_frames[-1], "Which appears last": by_frames[0]}[question]


@pytest.mark.parametrize("frames", [3, 4, 9])
def test_every_answer_is_what_the_frames_show(frames):
    skills = Counter()
    for raw in read(frames=frames, skills=clips.SKILLS, questions_per_clip=6):
        facts, text = raw.sample.metadata, raw.sample.turns[0].text
        assert text.count("<image>") == len(raw.image_sources) == len(raw.sample.images) == frames
        assert raw.sample.images == tuple(f"{raw.sample.id.rpartition('/')[0]}/{n}.png" for n in range(frames))
        question = text.partition("Question: ")[2].partition("? Options")[0]
        assert facts["choices"][facts["answer"]] == answer_by_looking(question, raw.image_sources)
        skills.update(facts["skills"])
    assert skills == dict.fromkeys(clips.SKILLS, 80)


def test_no_single_frame_gives_it_away():
    """Where a figure stands in the first frame and in the last says little of the way it goes: by its place alone, of
    four ways at most half are right, since it stays inside."""
    moved = read(train_clips=150, skills=["direction"], questions_per_clip=1)
    right = 0
    for raw in moved:
        name = raw.sample.turns[0].text.partition("does the ")[2].partition(" move")[0]
        first = next(one for scene in raw.image_sources for one in scene.figures if one.name == name)
        room = {"left": first.x, "right": 1 - first.x, "up": first.y, "down": 1 - first.y}
        right += max(room, key=room.get) == raw.sample.metadata["choices"][raw.sample.metadata["answer"]]
    assert right / len(moved) < 0.6


def test_a_plain_answer_needs_no_list_of_choices_in_its_prompt():
    for raw, listed in zip(read(choices="plain", prompt="{question}"), RAW):
        (user, assistant), facts = raw.sample.turns, raw.sample.metadata
        assert user.text == "<image>" * 4 + "\n" + listed.sample.turns[0].text.split("Question: ")[1].split(" Opt")[0]
        assert assistant.text == facts["candidates"][facts["answer"]] and facts["candidates"] == facts["choices"]
        assert facts == listed.sample.metadata | {"candidates": facts["candidates"]} and to_item(raw.sample, "x").whole


def test_frames_are_pictures_that_differ():
    first, *_, last = (np.asarray(Image.open(io.BytesIO(scene()))) for scene in RAW[0].image_sources)
    assert first.shape == (64, 64, 3) and (first != last).any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"frames": 0}, "a clip without frames shows neither motion nor order"),
        ({"frames": 2}, "option 'frames'"),
        ({"skills": ["colour"]}, "unknown 'colour'"),
        ({"prompt": "{question}"}, "options"),
        ({"prompt": "{options}", "choices": "plain"}, "each of {question}, {options} once"),
        ({"prompt": "Look!", "choices": "plain"}, "each of {question} once"),
        ({"choices": "bare"}, "option 'choices': unknown 'bare'"),
        ({"train_images": 3}, "train_images"),
    ],
)
def test_a_mistake_is_named(options, said):
    with pytest.raises(InputError, match=said):
        list(clips.read(None, options))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"options": {"frames": 0}}, "source 'clips', option 'frames': found 0, .* a clip without frames"),
        (
            {"options": {"frames": 6}, "max_images": 4},
            "data.max_images: found 4, but 'train/0/0' of clips shows 6 images",
        ),
    ],
)
def test_frames_that_no_pack_takes_are_named_before_anything_is_drawn(tmp_path, data, said):
    config = Config(data=DataConfig(source="clips", root=str(tmp_path / "data"), **data))
    with pytest.raises(InputError, match=said) as caught:
        ensure_samples(config, "val")
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob("*.jsonl")) + list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("frames", [(), ("0.png", "1.png"), ("0.png", "1.png", "gone.png")])
def test_a_film_of_ones_own_without_some_of_its_frames_is_named(tmp_path, frames):
    """Fewer than its text has places for, none, or a file that is not there: before any of it is packed or answered."""
    for name in ("0.png", "1.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    turns = [{"role": "user", "text": "<image>" * 3 + "Which moves?"}, {"role": "assistant", "text": "(a) star"}]
    facts = {"choices": ["star", "cross"], "answer": 0, "candidates": ["(a) star", "(b) cross"]}
    line = {"id": "film", "images": list(frames), "turns": turns, "metadata": {"question_type": "choose_txt", **facts}}
    (tmp_path / "val.jsonl").write_text(json.dumps(line) + "\n")
    config = Config(
        data=DataConfig(source="samples", input=str(tmp_path), root=str(tmp_path / "data")),
        eval=EvalConfig(scorer="iconqa"),
    )
    with pytest.raises(InputError, match='sample .film.|"film"') as caught:
        answerable_samples(ensure_samples(config, "val"), config, None)
    assert "\n" not in str(caught.value) and ("gone.png" in str(caught.value)) == (len(frames) == 3)


def test_it_takes_no_input(tmp_path):
    with pytest.raises(InputError, match="draws its frames"):
        list(clips.read(tmp_path, {}))
