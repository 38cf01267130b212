"""What is known of each sample lies on disk: ids, what splits share, drawn splits and packs are those of plain sets,
lists and loops, however little fits into memory."""

import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from data_prep import spool as spools
from data_prep.pack import PackSettings, pack
from data_prep.prepare import prepare
from data_prep.sources import SOURCES
from data_prep.sources.raw import RawSample
from data_prep.sources.splits import SplitOverlap, drawn
from data_prep.sources.splits import overlap as overlaps
from data_prep.sources.splits.drawn import share_of
from data_prep.spool import Spool
from data_prep.tokens import Tokens
from tests.benchmarks.samples import scienceqa_lengths
from vltrain.data.flat import columns, unique_ids
from vltrain.data.flat.columns import Column, Texts
from vltrain.data.flat.unique_ids import UniqueIds
from vltrain.data.origin import read_made_from
from vltrain.data.shards import PackedDataset
from vltrain.errors import InputError
from vltrain.schema import Sample, Turn


@pytest.fixture
def little_memory(monkeypatch):
    """Limits far below the sets of these tests."""
    monkeypatch.setattr(unique_ids, "NEWEST", 64)
    monkeypatch.setattr(overlaps, "_HELD", 16)
    for module in (columns, overlaps):
        monkeypatch.setattr(module, "AT_ONCE", 50)
    monkeypatch.setattr(spools, "MOST_AT_ONCE", 1000)


def test_columns_and_texts(tmp_path):
    column, texts = Column(tmp_path, np.int32), Texts(tmp_path)
    assert len(column.values()) == 0
    told = ["", "ünï", "a\nb", "", "🙂"]
    for _ in range(3):
        column.extend([1, -2])
        texts.extend(told)
        assert texts[len(texts) - 1] == "🙂"
    before = column.values()
    column.extend(np.arange(4))
    assert before.tolist() == [1, -2] * 3 and column.values().tolist() == [1, -2, 1, -2, 1, -2, 0, 1, 2, 3]
    assert list(texts) == told * 3 and list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="read-only"):
        column.values()[0] = 1


@pytest.mark.parametrize(("first", "second"), [(3, 40), (3, 999), (130, 131), (500, 998), (997, 998)])
def test_an_id_that_comes_twice_is_found_wherever_it_came_first(little_memory, tmp_path, first, second):
    names = [f"sample {number}" for number in range(1000)]
    names[second] = names[first]
    unique, added = UniqueIds(tmp_path, "unique"), []
    with pytest.raises(InputError, match=rf"^sample id 'sample {first}' comes twice; ids must be unique$"):
        for name in names:
            added.append(name)
            unique.add(name)
        unique.finish(lambda: names)
    assert (len(added) == 1000) == (first // 64 != second // 64), "among the newest it is found at once"


def test_unique_ids_are_taken_and_equal_hashes_are_no_proof(little_memory, tmp_path, monkeypatch):
    monkeypatch.setattr(unique_ids, "_hash", lambda data: len(data) << 60)  # many are alike
    unique, asked = UniqueIds(tmp_path, "unique"), []
    names = [str(number) for number in range(500)]
    unique.add_all(names)
    unique.finish(lambda: asked.append(1) or names)
    assert asked, "they were suspected"


def drawn_sample(draw: random.Random, number: int) -> tuple[str, Sample, list[str]]:
    names = [f"{draw.randrange(60)}.png" for _ in range(draw.choice((0, 1, 1, 2)))]
    turns = []
    for place in range(draw.choice((1, 1, 2))):
        text = "<image>" * len(names) * (place == 0) + draw.choice("abcdefgh")
        turns += [Turn(role="user", text=text), Turn(role="assistant", text="x")]
    split = draw.choice(("train", "train", "train", "train", "val", "test", "odd"))
    return split, Sample(id=str(number), images=tuple(names), turns=tuple(turns)), names


def plain_overlap(samples, content) -> list[tuple[str, str, int, int, int]]:
    """(one, other, shared images, samples that show them, samples that ask the same) by sets."""
    shown, asked = defaultdict(set), defaultdict(list)
    for split, sample, names in samples:
        same = tuple(content[name] for name in names)
        shown[split].update(same)
        asked[split].append((same, tuple(turn.text for turn in sample.turns[:-1])))
    found = []
    order = [name for name in ("train", "val", "odd", "test") if name in asked]
    for place, one in enumerate(order):
        for other in order[place + 1 :]:
            images, questions = shown[one] & shown[other], set(asked[one])
            showing = sum(bool(images & set(same)) for same, _ in asked[other])
            repeated = sum(key in questions for key in asked[other])
            if images or repeated:
                found.append((one, other, len(images), showing, repeated))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_overlap_of_splits_is_that_of_sets(little_memory, tmp_path, seed):
    draw = random.Random(seed)
    content = {}
    for number in range(60):
        content[f"{number}.png"] = draw.randrange(50)
        (tmp_path / f"{number}.png").write_bytes(b"%d" % content[f"{number}.png"])
    samples = [drawn_sample(draw, number) for number in range(700)]
    overlap = SplitOverlap(tmp_path)
    for split, sample, names in samples:
        overlap.add(split, sample, names)
    lines = overlap.lines({name: tmp_path / name for name in content})
    expected = plain_overlap(samples, content)
    assert len(lines) == len(expected) == 6
    for line, (one, other, num_images, showing, repeated) in zip(lines, expected, strict=True):
        assert line.startswith(f"splits '{one}' and '{other}' overlap, and were left so: ")
        assert f"{repeated} of the" in line and f"ask what a sample of '{one}' asks" in line
        if num_images:
            assert f": {num_images} of the" in line and f"; {showing} sample(s) show them" in line


def plain_draw(samples: list[RawSample], fractions: dict[str, float]) -> list[str]:
    """The split of each sample, by whole lists: groups by repeated merging, each by the hash of its smallest id."""
    groups = [{number} for number in range(len(samples))]
    by_image = defaultdict(list)
    for number, raw in enumerate(samples):
        for image in raw.image_sources:
            by_image[image.read_bytes()].append(number)
    for numbers in by_image.values():
        joined = set().union(*(groups[number] for number in numbers))
        for number in joined:
            groups[number] = joined
    whole = {min(group): group for group in groups}
    splits = {}
    for first, group in whole.items():
        share = share_of(min(samples[number].sample.id for number in group))
        bounds = {"val": fractions["val"], "test": fractions["val"] + fractions["test"], "train": 1.0}
        split = next(name for name, bound in bounds.items() if share < bound)
        splits[first] = ("train" if 2 * len(group) > len(samples) else split, share)
    for split, fraction in fractions.items():
        left = sorted(
            (share, first)
            for first, (name, share) in splits.items()
            if name == "train" and 2 * len(whole[first]) <= len(samples)
        )
        if fraction * len(whole) >= 1 and len(left) > 1 and split not in {name for name, _ in splits.values()}:
            splits[left[0][1]] = (split, left[0][0])
    return [splits[min(groups[number])][0] for number in range(len(samples))]


@pytest.mark.parametrize("seed", range(30))
def test_drawn_splits_are_those_of_whole_lists(tmp_path, seed):
    draw = random.Random(seed)
    count, num_images, alone = draw.choice((1, 2, 7, 30, 200)), draw.choice((1, 5, 60)), draw.choice((0, 0.5, 1))
    for number in range(num_images):
        (tmp_path / f"{number}.png").write_bytes(b"%d" % draw.randrange(num_images))
    samples = []
    for number in range(count):
        shown = [] if draw.random() < alone else [draw.randrange(num_images) for _ in range(draw.choice((1, 1, 1, 2)))]
        turns = (Turn(role="user", text="<image>" * len(shown) + "a"), Turn(role="assistant", text="b"))
        names = tuple(f"{one}.png" for one in shown)
        sample = Sample(id=f"{seed}/{number}", images=names, turns=turns)
        samples.append(RawSample(split="", sample=sample, image_sources=tuple(tmp_path / name for name in names)))
    fractions = {"val": draw.choice((0.05, 0.2)), "test": draw.choice((0.0, 0.1))}
    resolved = {f"{split}_fraction": fraction for split, fraction in fractions.items()}
    expected = plain_draw(samples, fractions)
    if "train" not in expected:
        with pytest.raises(InputError, match="leave none to train on"):
            list(drawn("mine", lambda: samples, resolved, {}))
        return
    assert [raw.split for raw in drawn("mine", lambda: samples, resolved, {})] == expected


def test_data_that_changes_while_splits_are_drawn_is_refused(tmp_path):
    def read(images=iter((3, 4))):
        for number in range(next(images)):
            path = tmp_path / f"{number}.png"
            path.write_bytes(b"%d" % number)
            turns = (Turn(role="user", text="<image>a"), Turn(role="assistant", text="b"))
            sample = Sample(id=str(number), images=(path.name,), turns=turns)
            yield RawSample(split="", sample=sample, image_sources=(path,))

    with pytest.raises(InputError, match="sample '3': was not there when the splits were drawn"):
        list(drawn("mine", read, {"val_fraction": 0.1}, {}))


def tokens_of(lengths: np.ndarray, images: np.ndarray) -> Tokens:
    ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return Tokens(
        ids=[str(number) for number in range(len(lengths))],
        images=[tuple(f"{number % 7}.png" for _ in range(count)) for number, count in enumerate(images.tolist())],
        lengths=lengths.tolist(), num_labels=(lengths // 2).tolist(), instruction_lengths=[0] * len(lengths),
        input_ids=ids.tobytes(), loss_mask=bytes(len(ids)),
    )  # fmt: skip


@pytest.mark.parametrize("padded", [False, True])
def test_packs_of_windows_hold_each_sample_once_and_are_as_full(little_memory, tmp_path, padded):
    lengths = np.minimum(scienceqa_lengths(20_000), 400)
    images = np.arange(len(lengths)) % 3
    spool = Spool(tmp_path)
    spool.fill([tokens_of(lengths, images)])
    kept = spool.select(lambda length, _: length < 400)
    assert np.array_equal(kept, np.flatnonzero(lengths < 400))
    packs = list(spool.assign(kept, 1280, 8, 0, padded=padded))
    assert sorted(np.concatenate(packs).tolist()) == kept.tolist()
    assert all(lengths[pack].sum() <= 1280 and images[pack].sum() <= 8 for pack in packs)
    if padded:
        return
    assert lengths[kept].sum() / (1280 * len(packs)) > 0.99
    window = np.concatenate(packs[: len(packs) // 20])  # of the first of twenty windows
    assert np.ptp(window) > 0.95 * len(lengths), "a window is drawn from all over the set"
    for samples in packs[:50]:
        row = spool.row(samples, np.array([int(path[0]) for path in spool.paths]))
        assert row.input_ids.tolist() == np.repeat(samples, lengths[samples]).tolist()
        shown = [one for one in samples.tolist() for _ in range(images[one])]
        assert row.image_ids[row.image_slots].tolist() == [one % 7 for one in shown]


def test_a_whole_set_is_packed_window_by_window(little_memory, tmp_path, monkeypatch):
    """From generated samples to shards: all there, each once, and the same again."""

    def read(place, options):
        for number in range(3_000):
            turns = (Turn(role="user", text=f"{number}? " * (1 + number % 9)), Turn(role="assistant", text="yes"))
            yield RawSample(split="val" if number % 100 == 7 else "train", sample=Sample(id=f"s{number}", turns=turns))

    monkeypatch.setitem(SOURCES, "shapes", read)
    monkeypatch.setattr("data_prep.prepare.option_texts", lambda *_: {})
    assert prepare("shapes", None, tmp_path / "samples", workers=1) == {"train": 2970, "val": 30}
    settings = PackSettings(tokenizer="asset://tiny_llama", visual_tokens=4, pack_length=256)
    made = [pack(tmp_path / "samples" / "train.jsonl", tmp_path / f"packs{n}", settings, workers=1) for n in range(2)]
    assert made[0] == made[1] and made[0].num_samples == 2970 and made[0].fill > 0.98
    packs = PackedDataset(tmp_path / "packs0")
    counts = Counter(one for number in range(len(packs)) for one in packs.sample_ids(number))
    assert counts == Counter({f"s{number}": 1 for number in range(3_000) if number % 100 != 7})
    assert sorted(path.name for path in Path(tmp_path / "packs0").iterdir()) == [
        "blocks.index", "index.arrow", "made_from.arrow", "made_from.json", "made_from.stats.npy", "manifest.json",
        "packs-00000.arrow",
    ]  # fmt: skip

    def read_twice(place, options):
        yield from read(place, options)
        yield next(iter(read(place, options)))

    monkeypatch.setitem(SOURCES, "shapes", read_twice)
    with pytest.raises(InputError, match="sample id 's0' comes twice; ids must be unique over all splits"):
        prepare("shapes", None, tmp_path / "twice", workers=1)
    assert not (tmp_path / "twice").exists()


def packed_of(folder: Path, tmp_path: Path, **settings) -> tuple[set[str], PackedDataset]:
    output = tmp_path / "-".join(f"{value}" for value in settings.values())
    pack(folder / "train.jsonl", output, PackSettings(**PLAIN, **settings), workers=1)
    dataset = PackedDataset(output)
    return {name for number in range(len(dataset)) for name in dataset.sample_ids(number)}, dataset


PLAIN = {"tokenizer": "asset://tiny_llama", "visual_tokens": 1, "pack_length": 64}


def test_a_share_of_the_samples_is_drawn_by_their_ids(little_memory, tmp_path):
    """A smaller share lies inside of a larger one, other samples change nothing, and another seed draws others."""
    for count, name in ((2000, "all"), (1000, "fewer")):
        (tmp_path / name).mkdir()
        lines = [
            Sample(id=f"s{number}", turns=(Turn(role="user", text="a"), Turn(role="assistant", text="b"))).to_json()
            for number in range(count)
        ]
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    all_of_them, tenth, hundredth = (
        packed_of(tmp_path / "all", tmp_path, fraction=share)[0] for share in (1.0, 0.1, 0.01)
    )
    assert len(all_of_them) == 2000 and hundredth < tenth < all_of_them
    assert abs(len(tenth) - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5 and 0 < len(hundredth) < 50
    fewer, _ = packed_of(tmp_path / "fewer", tmp_path / "fewer", fraction=0.1)
    assert fewer == {name for name in tenth if int(name[1:]) < 1000}
    other, packs = packed_of(tmp_path / "all", tmp_path, fraction=0.1, fraction_seed=1)
    assert len(other & tenth) < 60, "some 20 by chance"
    made = read_made_from(packs.folder)
    assert made.options["fraction"] == 0.1 and made.options["fraction_seed"] == 1
    with pytest.raises(InputError, match=r"draws none of 1000 samples; raise it \(in a recipe: data.fraction\)"):
        packed_of(tmp_path / "fewer", tmp_path, fraction=1e-9)
    with pytest.raises(InputError, match="fraction: found 1.5"):
        PackSettings(**PLAIN, fraction=1.5)


def test_samples_that_are_too_long_count_only_where_they_are_drawn(tmp_path):
    texts = {f"s{number}": "word " * (80 if number % 2 else 1) for number in range(40)}
    lines = [
        Sample(id=name, turns=(Turn(role="user", text=text), Turn(role="assistant", text="b"))).to_json()
        for name, text in texts.items()
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names, packs = packed_of(tmp_path, tmp_path, fraction=0.5, over_long="drop")
    drawn_ones = set(np.array(list(texts))[PackSettings(**PLAIN, fraction=0.5).drawn(list(texts))])
    assert names == {name for name in drawn_ones if len(texts[name]) < 10}
    assert packs.manifest.over_long == len(drawn_ones) - len(names) > 0
