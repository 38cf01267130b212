"""What pages list is what the code has: recipes, sources and options, scorers, templates, formats, rooms, keys."""

from __future__ import annotations

import configparser
import re
import signal

import pytest

from data_prep.sources import SOURCES
from data_prep.sources.options import all_options
from tests.pages.page import DATA, INSIDE, LAUNCH, PAGES, README, codes
from tests.support.processes import ROOT
from tests.test_layout import ROOMS
from vltrain.config.keys import known_keys, known_sections
from vltrain.config.schema import OWN
from vltrain.data.text.conversation import TEMPLATES
from vltrain.distributed.preemption import EXIT_REQUEUE
from vltrain.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR
from vltrain.evaluate.report import SCORERS
from vltrain.export.table import FORMATS
from vltrain.metrics.table import LOGGERS
from vltrain.shipped import RECIPES

KEY = re.compile(r"(?:model|data|optim|train|eval)\.[a-z_.]*[a-z_]")


def names_in(cell: str) -> set[str]:
    """`a_7b`, `b` (and `_x`): a_7b, b, and each of them with _x behind it, or in place of its last part."""
    plain, _, more = cell.partition("(and ")
    names, suffixes = codes(plain), codes(more)
    found = set(names)
    for name in names:
        for suffix in suffixes:
            found |= {
                each
                for each in (name + suffix, name.rpartition("_")[0] + suffix)
                if (RECIPES / f"{each}.yaml").is_file()
            }
    return found


def test_the_readme_lists_every_recipe():
    rows = README.table("recipe", "what it tunes")
    assert set().union(*(names_in(cell) for cell, _ in rows)) == {path.stem for path in RECIPES.glob("*.yaml")}
    for cell, _ in rows:  # no suffix that makes no name
        assert all(
            any(name.endswith(suffix) for name in names_in(cell)) for suffix in codes(cell.partition("(and ")[2])
        )


def test_sources_and_their_options():
    rows = {codes(name)[0]: (options, scorer) for name, _, options, scorer in DATA.table("source", "official files of")}
    assert set(rows) == {*SOURCES, OWN}
    for name, (options, scorer) in rows.items():
        if name == OWN:
            continue
        known = all_options(SOURCES[name], {})
        assert set(codes(options)) == set(known), name
        for option, default in re.findall(r"`(\w+)` \(([^)]*)\)", options):
            value = known[option]
            shown = ",".join(value) if isinstance(value, tuple) else "none" if value is None else str(value)
            assert re.split(r", or |:", default)[0] == shown, f"{name}: {option}"
        assert codes(scorer)[0] in SCORERS


def test_scorers_and_templates():
    assert {codes(name)[0] for name, _ in LAUNCH.table("`eval.scorer`")} == set(SCORERS)
    assert {codes(name)[0] for name, _ in DATA.table("template")} == set(TEMPLATES)


def test_loggers():
    assert {codes(name)[0] for name, _ in LAUNCH.table("`train.loggers`")} == set(LOGGERS)


def test_export_formats():
    found: dict[str, list[str]] = {}
    for architecture, form, _ in INSIDE.table("architecture", "format"):
        found.setdefault(codes(architecture)[0], []).append(codes(form)[0])
    assert found == {architecture: list(formats) for architecture, formats in FORMATS.items()}, "the default first"


def test_the_map_is_the_order_of_the_rooms():
    listed = [name for cell, _ in INSIDE.table("room") for name in codes(cell)]
    assert listed == [room for room in ROOMS if room != "__main__"]
    assert all((ROOT / "vltrain" / name).is_dir() or (ROOT / "vltrain" / f"{name}.py").is_file() for name in listed)


def test_extension_points_are_there():
    for _, _, line in INSIDE.table("to add"):
        if codes(line):
            *names, place = codes(line)
            text = (ROOT / place if place.startswith("data_prep") else ROOT / "vltrain" / place).read_text()
            assert names and all(re.search(rf"^{name}\b.* = [({{]", text, re.MULTILINE) for name in names), line


def test_exit_codes():
    codes_listed = [int(code) for code, _ in LAUNCH.table("exit code")]
    assert (
        codes_listed == [0, 1, EXIT_USER_ERROR, EXIT_REQUEUE, EXIT_INTERRUPTED]
        and EXIT_INTERRUPTED == 128 + signal.SIGINT
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_that_pages_name_are_keys(page):
    known = {*known_keys(), *known_sections()}
    for text in page.inline():
        for key in KEY.findall(text.lstrip("-")) if KEY.match(text.lstrip("-")) else ():
            assert key in known or key.startswith(
                ("data.options.", "model.ask", "model.chat", "model.stream", "model.answer_all")
            ), f"{page.name}: {key}"


def test_extras_that_pages_name_are_extras():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    known = set(config["options.extras_require"])
    for page in PAGES:
        named = {
            *re.findall(r"extra `(\w+)`", page.text),
            *re.findall(r"--with (\w+)", page.text),
            *re.findall(r"vltrain\[(\w+)\]", page.text),
        }
        assert named - {"EXTRA"} <= known, page.name


def test_what_the_doctor_is_said_to_print():
    """The lines in the launch page are of its tests."""
    code = "\n".join(path.read_text() for path in (ROOT / "vltrain" / "doctor").glob("*.py"))
    lines = [
        line
        for _, block in LAUNCH.blocks("text")
        for line in block.splitlines()
        if line.startswith(("ok ", "not here "))
    ]
    assert lines and all(re.split(r" {2,}", line)[1].split(" (")[0].split(" 2")[0] in code for line in lines)
