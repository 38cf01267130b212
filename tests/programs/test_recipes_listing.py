"""`vltrain recipes`: each that comes with vltrain in a line, and one whole."""

import pytest

from vltrain.programs.help import recipes
from vltrain.shipped import RECIPES

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def test_every_recipe_has_a_line_that_says_what_it_is(capsys):
    assert recipes.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all(
        len(line) <= 140 and len(line.split(maxsplit=1)[1]) > 20 and line.split(maxsplit=1)[1][0].isupper()
        for line in lines
    )
    assert next(line for line in lines if line.startswith("table2 ")).endswith("(5 rows)")


def test_one_is_shown_whole(capsys):
    assert recipes.main(["table2"]) == 0
    assert capsys.readouterr().out == (RECIPES / "table2.yaml").read_text()


def test_names_are_those_that_a_recipe_option_takes():
    names = recipes.names()
    assert {"quickstart", "table2", "table2#ba_8_2"} <= set(names) and len(names) == len(set(names))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["quikstart"], "did you mean 'quickstart'?"),
        (["a", "b"], "expected one name at most"),
        (["--all", "x"], "unknown option"),
    ],
)
def test_a_mistake_is_one_line(words, told, capsys):
    assert recipes.main(words) == 2
    assert told in capsys.readouterr().err
