"""What a recipe may say of a mixture, and what is refused in a line before anything is prepared."""

from pathlib import Path

import pytest
import yaml

from tests.attacks.inputs import sample, write_jsonl
from tests.support.tiny import make_segments, write_packs
from vltrain.config.command_line import load_settings
from vltrain.config.mixture import each_set, sets_of, weights_of
from vltrain.config.recipe import build_config, dump_config, read_recipe
from vltrain.errors import InputError
from vltrain.prepared.ensure_data import require_source
from vltrain.prepared.sets import require_sets

SHAPES = {"source": "shapes", "weight": 2.0}


def config_of(mixture, **changes):
    given = {"data.root": "data/mine", "data.mixture": mixture}
    return build_config({**given, **{name.replace("__", "."): value for name, value in changes.items()}})


def settings_of(folder: Path, content: dict, *words: str):
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return load_settings(["--recipe", str(file), *words], program="test").config


def test_each_set_is_a_recipe_of_its_own():
    own = {"source": "samples", "input": "mine", "eval_split": "dev", "scorer": "rouge", "root": "elsewhere"}
    config = config_of({"shapes": SHAPES, "own": own, "silent": {"root": "x", "scorer": None}}, data__pack_length=64)
    sets = sets_of(config)
    assert list(sets) == ["shapes", "own", "silent"] and weights_of(config) == {"shapes": 2, "own": 1, "silent": 1}
    shapes, mine, silent = sets.values()
    assert (shapes.data.root, shapes.data.source, shapes.eval.scorer) == ("data/mine/shapes", "shapes", "exact")
    assert (mine.data.root, mine.data.eval_split, mine.eval.scorer) == ("elsewhere", "dev", "rouge")
    assert silent.eval.scorer is None and all(one.data.pack_length == 64 for one in sets.values())
    assert not any(one.data.mixture for one in sets.values())
    plain = build_config({})
    assert each_set(plain) == {"": plain}


def test_it_is_written_back_whole_and_overlaid_by_set(tmp_path):
    data = {"root": "data/mine", "mixture": {"shapes": SHAPES, "old": {"root": "x"}}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"data": data}))
    own = {"base": "base.yaml", "output": "runs/x", "data": {"mixture": {"old": {"weight": 5}, "new": {"root": "y"}}}}
    words = ("--data.mixture.shapes.weight", "3", "--data.mixture.shapes.options.seed", "4")
    config = settings_of(tmp_path, own, *words, "--data.mixture_by", "tokens")
    assert config.data.mixture == {
        "shapes": {"source": "shapes", "weight": 3, "options": {"seed": 4}},
        "old": {"root": "x", "weight": 5},
        "new": {"root": "y"},
    }
    (tmp_path / "written.yaml").write_text(dump_config(config))
    assert build_config(read_recipe(tmp_path / "written.yaml")) == config


def test_a_set_is_left_out_on_the_command_line_as_the_refusal_says(tmp_path):
    content = {"data": {"root": "data/mine", "mixture": {"shapes": SHAPES, "old": {"root": "x"}}}}
    with pytest.raises(InputError, match="--data.mixture.old null"):
        settings_of(tmp_path, content, "--data.mixture", "{old: null}")
    assert list(settings_of(tmp_path, content, "--data.mixture.old", "null").data.mixture) == ["shapes"]


@pytest.mark.parametrize(
    ("mixture", "changes", "says"),
    [
        ({"a": {**SHAPES, "weight": 0}}, {}, r"data.mixture.a.weight: found 0, expected a number in \(0, "),
        ({"a": {**SHAPES, "weight": -1.0}}, {}, r"data.mixture.a.weight: found -1.0"),
        ({"a": {**SHAPES, "weight": float("nan")}}, {}, "data.mixture.a.weight: found nan, expected a finite number"),
        ({"a": {**SHAPES, "weight": "3"}}, {}, "data.mixture.a.weight: found '3'"),
        ({"a": {**SHAPES, "weigth": 1}}, {}, r"data.mixture.a: unknown key 'weigth', did you mean 'weight'"),
        ({"a": ["shapes"]}, {}, r"data.mixture.a: found \['shapes'\], expected the set's keys: weight, source"),
        (
            {"a": None},
            {},
            "data.mixture.a: found null, expected the set's keys.* --data.mixture.a null one of the recipe",
        ),
        ({"a": {"weight": 1}}, {}, "data.mixture.a: names no samples, expected source"),
        ({"../a": SHAPES}, {}, "found the name '../a', expected a folder's name"),
        ({"packed": SHAPES}, {}, "found the name 'packed'"),
        ({"a": SHAPES}, {"data__root": "data/easyvqa"}, "data.root: found 'data/easyvqa', which is kept for easyvqa"),
        ({"a": {**SHAPES, "scorer": "exact"}}, {"eval__scorer": None}, "data.mixture.a.scorer: has no effect"),
        ({"a": {**SHAPES, "scorer": None}}, {}, "no set has a scorer"),
    ],
)
def test_what_cannot_be_is_refused(mixture, changes, says):
    with pytest.raises(InputError, match=says):
        config_of(mixture, **changes)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"mixture": {"a": SHAPES}, "source": "shapes"}, "data.source: has no effect: each set of data.mixture has"),
        ({"mixture": {"a": SHAPES}, "train_packs": "packs"}, "data.train_packs: has no effect"),
        ({"mixture_by": "tokens"}, "data.mixture_by: has no effect"),
        ({"when_a_set_ends": "stop"}, "data.when_a_set_ends: has no effect"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path, data, says):
    with pytest.raises(InputError, match=says):
        settings_of(tmp_path, {"data": {"root": "data/mine", **data}})


def test_two_sets_of_one_name_are_refused(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("data:\n  root: x\n  mixture:\n    a: {source: shapes}\n    a: {source: easyvqa}\n")
    with pytest.raises(InputError, match="'a'"):
        read_recipe(file)


def own_set(folder: Path, *splits: str) -> dict[str, str]:
    for split in splits:
        write_jsonl(folder / f"{split}.jsonl", [sample(1)])
    return {"source": "samples", "input": str(folder)}


def test_each_set_is_looked_at_before_the_first_is_prepared(tmp_path):
    good = {"source": "shapes"}

    def refused(entry, says, **changes):
        with pytest.raises(InputError, match=says) as caught:
            require_sets(config_of({"good": good, "bad": entry}, data__root=str(tmp_path / "data"), **changes))
        assert str(caught.value).startswith("data.mixture.bad: ") and "\n" not in str(caught.value)
        assert not (tmp_path / "data").exists()

    refused({"source": "shape"}, "unknown 'shape', did you mean 'shapes'")
    refused({"source": "shapes", "options": {"train_image": 3}}, "no option 'train_image'; did you mean 'train_images'")
    refused({"source": "scienceqa", "input": str(tmp_path / "none")}, "none: no such file or folder")
    refused({**good, "scorer": "exakt"}, "unknown scorer 'exakt', did you mean 'exact'")
    refused(own_set(tmp_path / "own", "train"), "there is no split 'val'; splits there: train")
    refused({**own_set(tmp_path / "held", "val"), "train_split": "all"}, "there is no split 'all'")
    packs = str(write_packs(tmp_path / "packs", make_segments(2)))
    samples = own_set(tmp_path / "whole", "train", "val")
    refused({**samples, "train_packs": packs}, "packed with pack_length 64, the mixture's data.pack_length is 1024")
    refused({**samples, "train_packs": str(tmp_path)}, "not a folder of packed shards")
    require_sets(
        config_of(
            {"good": good, "own": {**samples, "train_packs": packs}}, data__root=str(tmp_path), data__pack_length=64
        )
    )


def test_an_error_of_a_recipe_without_a_mixture_names_none():
    config = build_config({"data.source": "samples", "data.root": "data/mine"})  # and no data.input
    with pytest.raises(InputError) as without:
        require_source(config.data)
    with pytest.raises(InputError) as found:
        require_sets(config)
    assert str(found.value) == str(without.value)
