"""A mixture's folder: its packs are those of its sets, whole and in their places, or it is refused."""

import json
import pickle
import shutil

import numpy as np
import pytest

from tests.mixtures.sets import make_mixture, make_sets
from tests.support.tiny import make_segments, write_packs
from vltrain.data.shards import PackedDataset
from vltrain.data.stream.mixed import SETS, mixed, open_packed
from vltrain.errors import InputError


def test_packs_and_images_are_the_sets_own(tmp_path):
    found = make_mixture(tmp_path)
    for opened in (found, open_packed(found.folder), pickle.loads(pickle.dumps(found))):
        assert len(opened) == 14 and opened.manifest.checksum == found.manifest.checksum
        for name, part in found.sets.items():
            first = 0 if name == "red" else 9
            for number in range(len(part)):
                own, row = part.row(number), opened.row(first + number)
                assert row.sample_ids == tuple(f"{name}/{one}" for one in own.sample_ids)
                assert opened.sample_ids(first + number) == row.sample_ids
                for field in ("input_ids", "loss_mask", "segment_lengths", "image_slots"):
                    assert np.array_equal(getattr(row, field), getattr(own, field))
                shown = [opened.image(one) for one in row.image_ids.tolist()]
                assert shown == [part.image(one) for one in own.image_ids.tolist()]
            assert np.array_equal(opened.index.num_tokens[first : first + len(part)], part.index.num_tokens)


def test_it_moves_with_its_sets(tmp_path):
    found = make_mixture(tmp_path / "here")
    names = found.sample_ids(13)
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = open_packed(tmp_path / "there" / "mixed" / found.folder.name)
    assert moved.manifest.checksum == found.manifest.checksum
    assert moved.sample_ids(13) == names


def test_weights_and_rule_are_part_of_what_it_is(tmp_path):
    sets = make_sets(tmp_path, red=4, blue=3)
    checksums = {
        mixed(tmp_path, sets, by, {"red": weight, "blue": 1.0}, ends).manifest.checksum
        for by, weight, ends in (
            ("tokens", 1.0, "repeat"), ("tokens", 2.0, "repeat"), ("tokens", 1.0, "stop"), ("passes", 1.0, "repeat"),
        )
    }  # fmt: skip
    assert len(checksums) == 4


def test_other_packs_in_a_sets_place_are_refused(tmp_path):
    found = make_mixture(tmp_path)
    other = write_packs(tmp_path / "other", make_segments(5, 7), 7)
    places = json.loads((found.folder / SETS).read_text())
    (found.folder / SETS).write_text(json.dumps({**places, "blue": str(other)}))
    with pytest.raises(InputError, match="not the packs of the set blue"):
        open_packed(found.folder)
    (found.folder / SETS).write_text(json.dumps({"red": places["red"]}))
    with pytest.raises(InputError, match="names other sets"):
        open_packed(found.folder)


def test_a_damaged_set_is_found(tmp_path):
    found = make_mixture(tmp_path)
    file = next((tmp_path / "blue" / "packed" / "train").glob("packs-*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(InputError, match="blue.*SHA-256"):
        open_packed(found.folder)


def test_packs_of_another_length_are_refused(tmp_path):
    sets = make_sets(tmp_path, red=2)
    manifest = sets["red"].manifest
    longer = PackedDataset(sets["red"].folder)
    longer.manifest = type(manifest)(**{**vars(manifest), "pack_length": 128})
    with pytest.raises(InputError, match=r"data.mixture: blue: its packs have pack_length 128, those of red 64"):
        mixed(tmp_path, {**sets, "blue": longer}, "tokens", {"red": 1.0, "blue": 1.0}, "repeat")
