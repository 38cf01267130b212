"""Recipes in stages: how they are read, what holds for which stage, and every way in which they are wrong."""

from pathlib import Path

import pytest

from vltrain.config.command_line import TRAIN_OPTIONS, load_settings
from vltrain.config.recipe import read_recipe, read_stages
from vltrain.config.stages import Run, dump_run, last_stage, load_stages, stage_folders, write_stages
from vltrain.errors import InputError

TWO = """
output: runs/two
model: {adapter: {dim: 8}}
optim: {lr: 1e-3}
stages:
  neck: {model: {tune: neck}, train: {epochs: 0.5}}
  adapters: {optim: {lr: 2e-3}}
"""


def write(folder: Path, text: str) -> str:
    path = folder / "two.yaml"
    path.write_text(text)
    return str(path)


def load(recipe: str, *words: str) -> Run:
    return load_stages(["--recipe", recipe, *words], options=TRAIN_OPTIONS, program="vltrain train")


def test_each_stage_is_a_run_that_begins_with_the_one_before(tmp_path):
    run = load(write(tmp_path, TWO), "--train.seed=3", "--data.pack_length", "64")
    first, second = (part.config for part in run.parts)
    assert run.names == ("neck", "adapters") and run.folder == Path("runs/two")
    assert (first.output, first.train.init_from, first.model.tune, first.optim.lr, first.train.epochs) == (
        "runs/two/1-neck",
        None,
        "neck",
        1e-3,
        0.5,
    )
    assert (second.output, second.train.init_from, second.model.tune, second.optim.lr) == (
        "runs/two/2-adapters",
        "runs/two/1-neck",
        "adapters",
        2e-3,
    )
    assert all(
        (part.model.adapter.dim, part.train.seed, part.data.pack_length) == (8, 3, 64) for part in (first, second)
    )


def test_another_output_and_another_origin_are_the_wholes(tmp_path):
    run = load(write(tmp_path, TWO), "--output", "elsewhere", "--train.init_from", "runs/before")
    assert [(part.config.output, part.config.train.init_from) for part in run.parts] == [
        ("elsewhere/1-neck", "runs/before"),
        ("elsewhere/2-adapters", "elsewhere/1-neck"),
    ]


def test_one_stage_alone_is_a_recipe(tmp_path):
    recipe = write(tmp_path, TWO)
    settings = load_settings(["--recipe", f"{recipe}#adapters"], program="vltrain train", options=TRAIN_OPTIONS)
    assert settings.config == load(recipe).parts[1].config
    neck = load(f"{recipe}#neck")
    assert neck.names == () and neck.parts[0].config == load(recipe).parts[0].config


def test_a_recipe_without_stages_is_one_run():
    run = load("quickstart", "--train.max_steps", "3")
    assert (
        run.names == ()
        and run.parts[0].config
        == load_settings(
            ["--recipe", "quickstart", "--train.max_steps", "3"], program="x", options=TRAIN_OPTIONS
        ).config
    )


@pytest.mark.parametrize("words", [(), ("--output", "elsewhere", "--eval.scorer", "null", "--train.init_from=runs/x")])
def test_the_resolved_whole_is_the_same_run(tmp_path, words, capsys):
    run = load(write(tmp_path, TWO), *words)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_run(run))
    again = load(str(resolved))
    assert [part.config for part in again.parts] == [part.config for part in run.parts] and again.folder == run.folder
    with pytest.raises(SystemExit) as end:
        load(str(tmp_path / "two.yaml"), *words, "--print_config")
    assert end.value.code == 0 and capsys.readouterr().out == resolved.read_text()


def test_what_all_stages_share_has_to_have_an_effect_in_one(tmp_path):
    recipe = write(tmp_path, TWO)
    assert load(recipe, "--model.adapter.dim=4").parts[1].config.model.adapter.dim == 4
    with pytest.raises(InputError, match="^model.neck.dim: has no effect in any stage: model.neck.kind = li"):
        load(recipe, "--model.neck.kind=linear", "--model.neck.dim=8")
    with pytest.raises(InputError, match="model.adapter.dim: has no effect: model.tune = neck"):
        load(f"{recipe}#neck", "--model.adapter.dim=4")
    with pytest.raises(InputError, match="model.adapter.dim: has no effect: model.tune = neck"):
        load_settings(["--model.tune=neck", "--model.adapter.dim=4"], program="x", options=TRAIN_OPTIONS)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("output: o\nstages: {a: {}}", "stages: found 1, expected two or more"),
        ("output: o\nstages: {a: {}, 'b/c': {}}", "found the name 'b/c', expected a folder's name"),
        ("output: o\nstages: [a, b]", "expected a mapping of stage names to settings"),
        ("output: o\nstages:", "stages: found null"),
        ("stages: {a: {}, b: {}}", "output: found nothing, expected the folder for the runs of all stages"),
        (
            "output: o\nstages: {a: {}, b: {output: x}}",
            "stage 'b': output: found a folder, expected none: its run goes into o/NUMBER-b",
        ),
        ("output: o\nstages: {a: {}, b: {train: {init_from: x}}}", "stage 'b': train.init_from: found 'x'"),
        (
            "output: o\nstages: {a: {}, b: {optim: {lrr: 1}}}",
            "stage 'b': unknown key 'optim.lrr', did you mean 'optim.lr'",
        ),
        ("output: o\nstages: {a: {}, b: {}}\nrows: {c: {}}", "found 'stages' beside 'rows'"),
        ("output: o\nstages: {a: {}, b: {eval: {top_p: 0.5}}}", "stage 'b': eval.top_p: has no effect"),
        (
            "output: o\nstages: {a: {}, b: {model: {seed: 3}}}",
            "stage 'b': model.seed: found 3, expected 0 as in stage 'a'",
        ),
        (
            "output: o\nstages: {a: {}, b: {model: {llm: {source: elsewhere}}}}",
            "stage 'b': model.llm.source: found 'elsewhere'",
        ),
        ("output: o\nstages: {a: {model: {adapter: {dim: 3}}}, b: {}}", "(stage 'a' of"),
    ],
)
def test_a_mistake_names_the_stage(tmp_path, text, told):
    with pytest.raises(InputError) as caught:
        load(write(tmp_path, text))
    assert told in str(caught.value)


def test_a_recipe_in_stages_is_no_single_run(tmp_path):
    recipe = Path(write(tmp_path, TWO))
    assert list(read_stages(recipe).stages) == ["neck", "adapters"]
    with pytest.raises(
        InputError, match=r"found a recipe in stages, expected one of them: .*two.yaml#neck, .*two.yaml#adapters"
    ):
        read_recipe(recipe)
    with pytest.raises(InputError, match="no stage 'nek' in .*did you mean 'neck'"):
        read_recipe(Path(f"{recipe}#nek"))
    (tmp_path / "on.yaml").write_text("base: two.yaml\noutput: o\n")
    with pytest.raises(InputError, match="found a recipe in stages"):
        read_recipe(tmp_path / "on.yaml")


def test_the_folder_says_which_stages_it_has(tmp_path):
    run = load(write(tmp_path, TWO), "--output", str(tmp_path / "run"))
    run.folder.mkdir()
    assert stage_folders(run.folder) == [] and last_stage(run.folder) == run.folder
    write_stages(run)
    write_stages(run)
    assert (
        stage_folders(run.folder) == [run.folder / "1-neck", run.folder / "2-adapters"]
        and last_stage(run.folder) == run.folder / "2-adapters"
    )
    other = load(write(tmp_path, TWO.replace("adapters:", "others:")), "--output", str(tmp_path / "run"))
    with pytest.raises(InputError, match="holds a run in the stages 1-neck, 2-adapters, this one has 1-neck, 2-others"):
        write_stages(other)
    (run.folder / "stages.json").write_text('{"stages": ["../x"]}')
    with pytest.raises(InputError, match="the file was changed"):
        stage_folders(run.folder)
