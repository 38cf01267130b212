"""Attacks on names: recipes, tables, DeepSpeed's files and numbers of ranks on the command line."""

from __future__ import annotations

import os
from contextlib import chdir
from pathlib import Path

from tests.attacks.attack import AttackFailed, Shown, attack, refused, right, told
from vltrain.shipped import DS_CONFIGS, RECIPES

NAMES, RANKS = "names of recipes and DeepSpeed files", "ranks asked for by a number"


@attack(NAMES)
def misspelt_recipe(folder: Path) -> Shown:
    """A recipe's name with a letter wrong, to every command that takes one."""
    with chdir(folder):
        for words in (
            ["train", "--recipe", "quikstart"],
            ["plan", "quikstart"],
            ["plan", "--recipe", "quikstart.yaml"],
            ["doctor", "--recipe", "quikstart"],
            ["submit", "--recipe", "quikstart", "--dry-run"],
            ["evaluate", "run", "--recipe", "quikstart"],
        ):
            if words[0] == "evaluate":
                Path("run").mkdir()
                Path("run", "config.yaml").write_text("")
            shown = refused(words, "quikstart", "did you mean 'quickstart'?")
        refused(["ablate", "tabel2"], "did you mean 'table2'?")
    return shown


@attack(NAMES)
def recipe_by_name(folder: Path) -> Shown:
    """A recipe and a table's row by name, from a folder in which nothing is."""
    with chdir(folder):
        for name, needle in (
            ("quickstart", "output: runs/quickstart"),
            ("quickstart.yaml", "output: runs/quickstart"),
            ("table2#ba_4_2", "output: runs/table2/ba_4_2"),
            ("table2.yaml#ba_4_2", "output: runs/table2/ba_4_2"),
        ):
            told(["train", "--recipe", name, "--print_config"], needle)
        return refused(["train", "--recipe", "table2#ba_4_3"], "no row 'ba_4_3'", "did you mean 'ba_4_2'?")


@attack(NAMES)
def a_file_of_that_name(folder: Path) -> Shown:
    """A file called as a recipe is: it wins; a folder is none."""
    with chdir(folder):
        Path("lavin_7b").mkdir()
        told(["train", "--recipe", "lavin_7b", "--print_config"], "output: runs/lavin_7b")
        Path("quickstart").write_text("output: runs/mine\n")
        Path("odd#name.yaml").write_text("output: runs/odd\n")
        told(["train", "--recipe", "odd#name.yaml", "--print_config"], "output: runs/odd")
        return told(["train", "--recipe", "quickstart", "--print_config"], "output: runs/mine")


@attack(NAMES)
def a_path_that_is_not_here(folder: Path) -> Shown:
    """launch/recipes/NAME.yaml, from elsewhere: told that the name is enough; another path is just not there."""
    with chdir(folder):
        refused(["train", "--recipe", "mine/own.yaml"], "mine/own.yaml")
        return refused(
            ["train", "--recipe", "launch/recipes/quickstart.yaml"], "no such file", "name it without a path"
        )


@attack(NAMES)
def a_base_by_name(folder: Path) -> Shown:
    """A recipe of one's own that stands on one that comes with vltrain; misspelt, it is refused."""
    own = folder / "own.yaml"
    own.write_text("base: quickstart\noutput: runs/own\nmodel: {adapter: {dim: 8}}\n")
    told(["train", "--recipe", own, "--print_config"], "output: runs/own")
    own.write_text("base: quickstrat\noutput: runs/own\n")
    return refused(["train", "--recipe", own, "--print_config"], "base: 'quickstrat'", "did you mean 'quickstart'?")


@attack(NAMES)
def deepspeed_file_by_name(folder: Path) -> Shown:
    """--ds by name, and misspelt, from a folder in which nothing is."""
    with chdir(folder):
        told(["plan", "quickstart", "--ds", "zero3"], "ZeRO stage 3")
        refused(
            ["train", "--recipe", "quickstart", "--ds", "ds_configs/zero2.json", "--output", "x"],
            "name it without a path",
        )
        return refused(["plan", "quickstart", "--ds", "zreo3"], "--ds", "did you mean 'zero3'?", untouched=folder)


@attack(NAMES)
def what_comes_along_is_found(folder: Path) -> Shown:
    """The folders that names are looked for in hold what README names."""
    if not (RECIPES / "quickstart.yaml").is_file() or not (DS_CONFIGS / "zero2.json").is_file():
        raise AttackFailed("silent", f"{RECIPES} and {DS_CONFIGS} are empty")
    return right(str(RECIPES.name))


@attack(RANKS)
def no_number_of_ranks(folder: Path) -> Shown:
    """--ranks of nothing, of words, below one, of far too many."""
    with chdir(folder):
        for text in ("0", "-1", "two", "1.5", "", "٢", "99999"):
            shown = refused(["train", "--recipe", "quickstart", f"--ranks={text}"], "--ranks", untouched=folder)
        return shown


@attack(RANKS)
def ranks_inside_of_ranks(folder: Path) -> Shown:
    """--ranks in a process that a launcher has started as one of several."""
    with chdir(folder):
        return refused(
            ["train", "--recipe", "quickstart", "--ranks", "2"],
            "--ranks",
            "of a launcher already",
            env={"RANK": "0", "WORLD_SIZE": "2"},
            untouched=folder,
        )


@attack(RANKS)
def ranks_of_what_runs_alone(folder: Path) -> Shown:
    """--ranks with a command that has none."""
    with chdir(folder):
        refused(["plan", "quickstart", "--ranks", "2"], "unknown option '--ranks'")
        return refused(["export", "run", "--ranks", "2"], "--ranks")


@attack(RANKS, slow=True)
def ranks_that_fail(folder: Path) -> Shown:
    """Both ranks find the same mistake: the exit code is theirs, and the line stands once for each."""
    with chdir(folder):
        before = dict(os.environ)
        shown = refused(["train", "--recipe", "quickstart", "--ranks", "2", "--data.root", "/dev/null/x"], process=True)
        assert dict(os.environ) == before
        return shown
