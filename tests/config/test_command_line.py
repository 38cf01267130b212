"""Recipes and command lines: what is read, what wins, and every way in which a mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from data_prep.sources import SOURCES
from vltrain.config.command_line import TRAIN_OPTIONS, Settings, load_settings
from vltrain.config.keys import checked_value, keys_of, known_keys
from vltrain.config.recipe import build_config, dump_config, read_recipe
from vltrain.config.schema import Config
from vltrain.data.text.conversation import TEMPLATES
from vltrain.errors import InputError, exits_cleanly
from vltrain.evaluate.report import SCORERS
from vltrain.models.adapters import ADAPTERS


def load(*words: str, **kwargs) -> Settings:
    return load_settings(list(words), program="vltrain train", options=TRAIN_OPTIONS, **kwargs)


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_nothing_given_is_the_defaults():
    loaded = load()
    assert loaded.config == Config()
    assert loaded.given == frozenset()
    assert loaded.options == {"ranks": None, "ds": None, "resume": "auto", "rebuild": None, "quiet": None}


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_defaults(tmp_path):
    path = recipe(tmp_path, "model: {adapter: {dim: 4, groups: 4}}\noptim: {lr: 1e-3}\n")
    loaded = load(
        "--recipe", str(path), "--model.adapter.dim=8", "--train.epochs", "3", "--ds", "zero2.json", "--local_rank=1"
    )
    assert (loaded.config.model.adapter.dim, loaded.config.model.adapter.groups) == (8, 4)
    assert loaded.config.optim.lr == 1e-3
    assert loaded.config.train.epochs == 3.0
    assert loaded.options["ds"] == "zero2.json"
    assert loaded.given == {"model.adapter.dim", "model.adapter.groups", "optim.lr", "train.epochs"}
    assert loaded.overrides == {"model.adapter.dim", "train.epochs"}
    assert loaded.recipe == path


def test_the_default_recipe_is_read_unless_another_is_named(tmp_path):
    path = recipe(tmp_path, "output: from-default\n")
    other = tmp_path / "other.yaml"
    other.write_text("train: {seed: 3}\n")
    assert load(default_recipe=path).config.output == "from-default"
    assert load("--recipe", str(other), default_recipe=path).config.output == Config().output


def test_keys_inside_a_mapping_join_the_recipes_and_a_whole_mapping_replaces_it(tmp_path):
    path = recipe(
        tmp_path, "model: {llm: {source: null, tokenizer: t, config: {hidden_size: 32, num_hidden_layers: 2}}}\n"
    )
    joined = load("--recipe", str(path), "--model.llm.config.hidden_size", "64", "--model.llm.config.tie", "true")
    assert joined.config.model.llm.config == {"hidden_size": 64, "num_hidden_layers": 2, "tie": True}
    replaced = load("--recipe", str(path), "--model.llm.config", "{hidden_size: 8}")
    assert replaced.config.model.llm.config == {"hidden_size": 8}


def test_dots_go_into_a_mapping_that_the_recipe_has(tmp_path):
    parts = "{vision_config: {hidden_size: 32, layers: {first: 1}}, tie: true}"
    section = f"{{config: {parts}, tokenizer: t, qformer_tokenizer: t}}"
    path = recipe(tmp_path, f"model: {{architecture: instructblip, instructblip: {section}}}\n")
    key = "--model.instructblip.config"
    words = [f"{key}.vision_config.patch_size", "4", f"{key}.vision_config.layers.first", "2", f"{key}.tie.x", "3"]
    assert load("--recipe", str(path), *words).config.model.instructblip.config == {
        "vision_config": {"hidden_size": 32, "patch_size": 4, "layers": {"first": 2}},
        "tie": True,
        "tie.x": 3,
    }


def test_a_later_option_wins():
    assert load("--train.seed", "1", "--train.seed", "2").config.train.seed == 2


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--model.adapter.dimm", "3"], ["--model.adapter.dimm", "did you mean 'model.adapter.dim'"]),
        (["--lr", "3"], ["--lr", "did you mean 'optim.lr'"]),
        (["--model.adaptr.dim", "3"], ["did you mean 'model.adapter.dim'"]),
        (["--resum", "auto"], ["--resum", "did you mean 'resume'"]),
        (["--model", "{}"], ["--model is a section", "--model.architecture"]),
        (["--model.adapter.dim", "x"], ["--model.adapter.dim", "'x'", "a whole number"]),
        (["--model.adapter.dim", "8.5"], ["'8.5'", "a whole number"]),
        (["--model.adapter.vision", "sideways"], ["'sideways'", "one of none, attention, ffn, both"]),
        (["--optim.lr", "nan"], ["optim.lr", "a finite number"]),
        (["--optim.lr", "null"], ["optim.lr", "'null'", "a finite number"]),
        (["--model.llm.peft.kind", "lorra"], ["'lorra'", "one of lora, dora, rslora, pissa, adaption_prompt or null"]),
        (
            ["--model.llm.peft.kind", "lora", "--model.llm.peft.targets", "[1]"],
            ["targets", "a list, each of it a text"],
        ),
        (
            ["--model.llm.peft.kind", "lora", "--model.llm.peft.targets", "[]"],
            ["targets", "one or more layers, each once"],
        ),
        (["--model.llm.peft.kind", "lora", "--model.llm.peft.targets", "[q_proj,q_proj]"], ["targets", "each once"]),
        (["--model.llm.peft.kind", "lora", "--model.llm.peft.rank", "0"], ["rank", "a number in [1, 1048576]"]),
        (
            ["--model.llm.peft.kind", "adaption_prompt", "--model.llm.peft.adapter_layers", "0"],
            ["adapter_layers", "a number in [1, "],
        ),
        (["--model.llm.pft.rank", "3"], ["did you mean 'model.llm.peft.rank'"]),
        (["--optim.betas", "[0.9]"], ["optim.betas", "a list of 2 numbers"]),
        (["--optim.clip", "-1"], ["optim.clip", "-1.0", "a number in [0, 1000000000]"]),
        (["--data.options", "[" * 400], ["--data.options", "a mapping"]),
        (["--optim.clip"], ["--optim.clip", "no value"]),
        (["--optim.clip", "--train.seed", "1"], ["--optim.clip", "no value"]),
        (["--print_config=yes"], ["--print_config", "takes no value"]),
        (["stray"], ["'stray'"]),
        (["--recipe", "a", "--recipe", "b"], ["several --recipe"]),
        (["--model.llm.config.", "3"], ["--model.llm.config."]),
        (["--model.llm.source", "null"], ["model.llm", "either `source`"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_with_the_place_and_the_way_out(words, parts):
    with pytest.raises(InputError) as caught:
        load(*words)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: {adapter: {dimm: 3}}", ["model.adapter.dimm", "did you mean 'model.adapter.dim'"]),
        ("optim: {epochs: 3}", ["optim.epochs", "did you mean 'train.epochs'"]),
        ("lr: 1", ["'lr'", "did you mean 'optim.lr'"]),
        ("model.adapter.dim: 8", ["dotted key 'model.adapter.dim'", "nested"]),
        ("model: null", ["model: found null, expected a section"]),
        ("model: {adapter: 5}", ["model.adapter: found 5, expected a section"]),
        ("- 1", ["the whole file", "expected a section"]),
        ("optim: {lr: null}", ["optim.lr: found null, expected a finite number"]),
        ("optim: {lr: '0.1'}", ["optim.lr: found '0.1'"]),
        ("optim: {lr: .inf}", ["optim.lr: found inf"]),
        ("model: {adapter: {dim: true}}", ["model.adapter.dim: found True, expected a whole number"]),
        ("model: {adapter: {dim: 8.0}}", ["found 8.0"]),
        ("model: {vision: {train: yes}}", ["model.vision.train: found 'yes', expected true or false"]),
        ("data: {input: 5}", ["data.input: found 5, expected a text that is not empty or null"]),
        ("data: {options: [1]}", ["data.options", "a mapping"]),
        ("data: {options: {1: 2}}", ["data.options", "a mapping"]),
        ("optim: {betas: [0.9, a]}", ["optim.betas", "a list of 2 numbers"]),
        ("train: {seed: 1}\ntrain: {seed: 2}", ["line 2", "'train' a second time"]),
        ("data: {options: {a: 1, a: 2}}", ["'a' a second time"]),
        ("a: &x [1]\nb: *x", ["line 1", "anchor or alias"]),
        ("data: {options: {a: !!python/name:os.system x}}", ["tag"]),
        ("data: {options: {a: " + "[" * 40 + "]" * 40 + "}}", ["nested deeper"]),
        ("model: [unclosed", ["line"]),
        ("train: {seed: 1}\n---\ntrain: {seed: 2}", ["line"]),
        ("? [a]\n: 1", ["not a plain string"]),
        ("train: {seed: " + "9" * 5000 + "}", ["digits"]),
    ],
)
def test_a_mistake_in_a_recipe_names_file_and_key(tmp_path, text, parts):
    path = recipe(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load("--recipe", str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for part in parts:
        assert part in message


def test_unreadable_recipes_are_named(tmp_path):
    (tmp_path / "latin1.yaml").write_bytes(b"output: caf\xe9\n")
    (tmp_path / "large.yaml").write_bytes(b"# " + b"x" * (1 << 20))
    wrong = {
        "latin1.yaml": "not UTF-8",
        "large.yaml": "larger than",
        "missing.yaml": "cannot be read",
        ".": "cannot be read",
    }
    for name, part in wrong.items():
        with pytest.raises(InputError, match=part):
            load("--recipe", str(tmp_path / name))


def test_scalars_follow_yaml_1_2(tmp_path):
    path = recipe(
        tmp_path,
        "data: {options: {a: 1e-3, b: no, c: 010, d: 0x1f, e: 1:30, f: 2020-01-01, g: ~, h: '5', i: .5, j: True}}\n",
    )
    expected = {
        "a": 1e-3,
        "b": "no",
        "c": 10,
        "d": 31,
        "e": "1:30",
        "f": "2020-01-01",
        "g": None,
        "h": "5",
        "i": 0.5,
        "j": True,
    }
    assert read_recipe(path)["data.options"] == expected


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--model.neck.kind", "linear", "--model.neck.dim", "64"], "model.neck.dim"),
        (["--model.neck.kind", "linear", "--model.neck.dim", "128"], "model.neck.dim"),
        (["--eval.top_p", "0.5"], "eval.top_p"),
        (["--eval.method", "rank", "--eval.max_new_tokens", "4"], "eval.max_new_tokens"),
        (["--eval.method", "rank", "--eval.temperature", "0.5"], "eval.temperature"),
        (["--eval.normalise_length", "true"], "eval.normalise_length"),
        (["--optim.vision_lr", "1e-4"], "optim.vision_lr"),
        (["--optim.llm_lr", "1e-4", "--model.vision.train", "true"], "optim.llm_lr"),
        (
            ["--model.adapter.vision", "none", "--model.adapter.llm", "none", "--model.adapter.dim", "8"],
            "model.adapter.dim",
        ),
        (["--model.llm.peft.rank", "4"], "model.llm.peft.rank"),
        (["--model.llm.peft.kind", "lora", "--model.llm.peft.adapter_len", "4"], "model.llm.peft.adapter_len"),
        (
            ["--model.llm.peft.kind", "adaption_prompt", "--model.llm.peft.targets", "[q_proj]"],
            "model.llm.peft.targets",
        ),
    ],
)
def test_a_setting_without_effect_fails(words, key):
    with pytest.raises(InputError, match=f"{key}: has no effect"):
        load(*words)


@pytest.mark.parametrize("key", ["output", "data.root", "data.cache"])
def test_an_address_where_something_is_written_is_refused(key):
    with pytest.raises(InputError, match=f"{key}: found 's3://bucket/x', expected a folder of this machine"):
        load("--data.train_packs", "s3://bucket/packs", f"--{key}", "s3://bucket/x")


def test_the_same_settings_pass_where_they_have_an_effect():
    load("--model.neck.dim", "64")
    load("--eval.top_p", "0.5", "--eval.temperature", "0.1")
    load("--eval.normalise_length", "true", "--eval.method", "rank")
    load("--optim.vision_lr", "1e-4", "--model.vision.train", "true")
    load("--optim.llm_lr", "1e-4", "--model.tune", "full")
    load("--model.adapter.vision", "none", "--model.adapter.dim", "8")
    lora = load("--model.llm.peft.kind", "lora", "--model.llm.peft.targets", "[o_proj,k_proj]").config.model.llm.peft
    assert lora.targets == ("o_proj", "k_proj")
    load("--model.llm.peft.kind", "adaption_prompt", "--model.llm.peft.adapter_layers", "3")


def test_a_recipes_setting_without_effect_fails_but_a_resolved_configuration_loads(tmp_path):
    with pytest.raises(InputError, match="model.neck.dim: has no effect"):
        load("--recipe", str(recipe(tmp_path, "model: {neck: {kind: linear, dim: 64}}")))
    resolved = load("--model.neck.kind", "linear").config
    assert load("--recipe", str(recipe(tmp_path, dump_config(resolved)))).config == resolved


def test_the_command_line_may_make_a_finished_runs_setting_idle_but_not_its_own(tmp_path):
    run = recipe(tmp_path, dump_config(load("--eval.max_new_tokens", "4").config))
    load("--eval.method", "rank", default_recipe=run, default_is_checked=True)
    for words, facts in (
        (["--eval.method", "rank"], {"default_recipe": run}),
        (["--eval.method", "rank", "--eval.max_new_tokens", "3"], {"default_recipe": run, "default_is_checked": True}),
        (
            ["--eval.method", "rank", "--recipe", str(recipe(tmp_path, "eval: {max_new_tokens: 5}"))],
            {"default_is_checked": True},
        ),
    ):
        with pytest.raises(InputError, match="eval.max_new_tokens: has no effect"):
            load(*words, **facts)


def test_the_printed_configuration_is_the_whole_and_loads_back_equal(tmp_path, capsys):
    words = [
        "--model.adapter.dim",
        "8",
        "--optim.lr",
        "3e-7",
        "--data.options.note",
        "no",
        "--output",
        "1e3",
        "--data.max_images",
        "4",
    ]
    with pytest.raises(SystemExit) as ended:
        load(*words, "--print_config")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    reloaded = load("--recipe", str(recipe(tmp_path, printed)))
    assert reloaded.config == load(*words).config
    assert reloaded.given == set(keys_of("mmt"))


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs", "Cc"))),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=("Cs", "Cc"))), inner, max_size=3)
    ),
    max_leaves=8,
)


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    options=st.dictionaries(st.text(st.characters(exclude_categories=("Cs", "Cc"))), PLAIN, max_size=4),
    lr=st.floats(1e-300, 10),
)
def test_any_configuration_survives_the_round_trip(tmp_path_factory, options, lr):
    config = build_config({"data.options": checked_value("data.options", options, "test"), "optim.lr": lr})
    path = recipe(tmp_path_factory.mktemp("round"), dump_config(config))
    assert build_config(read_recipe(path)) == config


@hypothesis_settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(known_keys())), st.text(max_size=12))
def test_any_value_on_the_command_line_is_taken_or_refused_by_an_input_error(key, text):
    try:
        load(f"--{key}={text}")
    except InputError as error:
        assert key.split(".")[0] in str(error)


def test_every_key_is_in_the_help(capsys):
    with pytest.raises(SystemExit) as ended:
        load("--help")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert [key for key in known_keys() if f"--{key} " not in printed] == []
    lines = printed.split("\n")
    assert max(map(len, lines)) <= 100
    shown = [line.split()[0][2:] for line in lines if line.startswith("  --") and "." in line.split()[0]]
    assert sorted(shown) == sorted(key for key in known_keys() if "." in key), "each once"
    assert "  --model.tune {adapters,neck,full}  [adapters]" in lines and "  --model.adapter.dim N  [16]" in lines
    for key, registry in (
        ("model.adapter.kind", ADAPTERS),
        ("eval.scorer", SCORERS),
        ("data.source", SOURCES),
        ("data.template", TEMPLATES),
    ):
        after = printed[printed.index(f"--{key} {{") :]
        assert set(registry) <= set("".join(after[after.index("{") + 1 : after.index("}")].split()).split(","))
    assert "Width h of the bottleneck" in printed
    assert "--resume" in printed and "usage: vltrain train" in printed


def test_a_program_ends_with_code_2_and_one_line(capsys):
    main = exits_cleanly(lambda words: load(*words) and 0)
    assert main(["--lr", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")


def test_bits_has_a_short_name(capsys):
    for words in (["--bits", "4"], ["--bits=4"], ["--model.bits", "4"]):
        loaded = load(*words)
        assert loaded.config.model.bits == 4 and loaded.overrides == {"model.bits"}
    assert load("--bits", "4", "--model.bits", "null").config.model.bits is None
    with pytest.raises(InputError, match="--model.bits: found '5', expected one of 4, 8, 16, 32 or null"):
        load("--bits", "5")
    with pytest.raises(InputError, match="model.bits: has no effect: ViT and LLM are both tuned themselves"):
        load("--bits", "32", "--model.tune", "full")
    with pytest.raises(SystemExit):
        load("--help")
    assert "--bits" in capsys.readouterr().out


def test_bits_in_a_recipe_are_a_number(tmp_path):
    assert load("--recipe", str(recipe(tmp_path, "model: {bits: 8}\n"))).config.model.bits == 8
    for wrong in ("'8'", "8.0", "true", "7"):
        with pytest.raises(InputError, match="model.bits: found .*, expected one of 4, 8, 16, 32 or null"):
            load("--recipe", str(recipe(tmp_path, f"model: {{bits: {wrong}}}\n")))


BLIP = ["--model.architecture", "instructblip", "--model.instructblip.source", "somewhere"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--model.instructblip.source", "x"],
            "model.instructblip.source: .*of the architecture instructblip, and .*mmt",
        ),
        (
            ["--model.instructblip.qformer.rank", "8"],
            "model.instructblip.qformer.rank: .*of the architecture instructblip",
        ),
        ([*BLIP, "--model.neck.dim", "128"], "model.neck.dim: .*of the architecture mmt, and .* is instructblip"),
        ([*BLIP, "--model.llm.config.hidden_size", "64"], "model.llm.config: .*of the architecture mmt"),
        (["--model.architecture", "mtt"], "model.architecture: found 'mtt', expected one of mmt, instructblip, stock"),
    ],
)
def test_a_key_of_another_architecture_fails_and_says_whose_it_is(words, said):
    with pytest.raises(InputError, match=said):
        load(*words)


def test_keys_of_one_architecture_have_no_place_in_another():
    assert not hasattr(load().config.model, "instructblip") and not hasattr(load(*BLIP).config.model, "neck")
    mmt, blip, stock = (keys_of(name).keys() for name in ("mmt", "instructblip", "stock"))
    assert mmt | blip | stock == known_keys().keys()
    of_all = {"model.architecture", "model.bits", "model.seed"}
    assert {key for key in mmt & blip if key.startswith("model.")} == of_all
    shared = {key for key in mmt & stock if key.startswith("model.")}
    assert shared - of_all == {key for key in known_keys() if key.startswith("model.adapter.")}


def test_a_recipe_that_names_every_key_of_every_architecture_loads_as_older_runs_wrote_it(tmp_path):
    """Versions before this wrote the defaults of the architecture that a run is not of, too."""
    old = {
        key: list(one.default) if isinstance(one.default, tuple) else one.default for key, one in known_keys().items()
    }
    for words in ([], BLIP):
        mine = load(*words).config
        stored: dict = {}
        for key, value in old.items():
            *sections, name = key.split(".")
            place = stored
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = value
        stored["model"]["architecture"] = mine.model.architecture
        stored["model"]["instructblip"]["source"] = "somewhere" if words else None
        path = recipe(tmp_path, yaml.safe_dump(stored))
        assert load("--recipe", str(path)).config == mine
        assert load(default_recipe=path, default_is_checked=True).config == mine
    stored["model"]["neck"]["dim"] = 64
    with pytest.raises(InputError, match="model.neck.dim: .*of the architecture mmt"):
        load("--recipe", str(recipe(tmp_path, yaml.safe_dump(stored))))
