"""`vltrain scaling`: lines against closed forms, and what comes of tables that are done, planned or begun."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from vltrain.programs.studies.fits import fit_line
from vltrain.programs.studies.scaling import main
from vltrain.programs.studies.table import DONE, Beside, Outcome, write_table


def test_a_line_is_found_again():
    points = [(share, seed, 0.9 + 0.05 * np.log10(share)) for share in (0.001, 0.01, 0.1, 1.0) for seed in range(3)]
    fit = fit_line(points)
    assert (fit.slope, fit.at_one, fit.rms) == (pytest.approx(0.05), pytest.approx(0.9), pytest.approx(0, abs=1e-12))
    assert fit.slope_interval == (pytest.approx(0.05), pytest.approx(0.05))
    assert fit.at(0.01) == pytest.approx(0.8) and (fit.points, fit.seeds) == (12, 3)


def test_the_line_is_that_of_the_normal_equations_and_its_interval_that_of_seeds():
    generator = np.random.default_rng(1)
    shares, slopes = (0.01, 0.03, 0.2), (0.02, 0.05, 0.08)
    points = [
        (x, seed, slope * np.log10(x) + generator.normal(0, 1e-4)) for seed, slope in enumerate(slopes) for x in shares
    ]
    fit = fit_line(points)
    x, y = np.log10([one[0] for one in points]), np.array([one[2] for one in points])
    assert fit.slope == pytest.approx(np.polyfit(x, y, 1)[0]) and fit.at_one == pytest.approx(np.polyfit(x, y, 1)[1])
    # Student's t of three slopes: 4.3027 times their standard deviation over the root of three.
    half = 4.3027 * 0.03 / np.sqrt(3)
    assert fit.slope_interval == (pytest.approx(0.05 - half, abs=1e-3), pytest.approx(0.05 + half, abs=1e-3))


def test_a_seed_with_a_single_share_is_in_the_line_but_has_no_slope_of_its_own():
    of_two = [(0.01, 0, 0.5), (0.1, 0, 0.6), (0.01, 1, 0.5), (0.1, 1, 0.7)]
    fit, more = fit_line(of_two), fit_line([*of_two, (0.1, 2, 0.62)])
    widths = [one.slope_interval[1] - one.slope_interval[0] for one in (fit, more)]
    assert widths[0] == pytest.approx(widths[1]) and (fit.seeds, more.seeds) == (2, 3) and more.slope != fit.slope


def test_a_single_share_has_no_line_and_a_single_seed_no_interval():
    assert fit_line([(0.1, 0, 0.5), (0.1, 1, 0.6)]) is None and fit_line([]) is None
    fit = fit_line([(0.1, 0, 0.5), (1.0, 0, 0.7)])
    assert fit.slope == pytest.approx(0.2) and fit.slope_interval is None


def outcome(value: float, trained: int) -> Outcome:
    metrics = {"measure": "accuracy", "accuracy": value, "total": 40, "failed": 0, "columns": {}}
    return Outcome(state=DONE, parameters=10_000, full_qformer=1000, trained=trained, steps=1, metrics=metrics)


@pytest.fixture
def tables(tmp_path):
    """Of one, two ranks on 1% and all of the data with three seeds; of the other, a row that is planned alone."""
    share = {1: {"data.fraction": 0.01}, 100: {}}
    rows = {
        f"r{rank}_of_{of}": {"model.instructblip.qformer.rank": rank, **share[of]} for of in share for rank in (1, 10)
    }
    values = {"r1_of_1": 0.3, "r10_of_1": 0.4, "r1_of_100": 0.8, "r10_of_100": 0.82}
    runs = {
        row: {seed: outcome(value + 0.01 * seed, 10 if row.startswith("r1_") else 100) for seed in range(3)}
        for row, value in values.items()
    }
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    write_table(tmp_path / "one", rows, runs)
    planned = {"peak_gib": 16.11, "hours": 2.0, "gpus": 8, "trained": 20, "trained_share": 0.02}
    write_table(tmp_path / "two", {"r2": {}}, {"r2": {None: Outcome()}}, Beside(planned={"r2": planned}))
    return tmp_path


def test_tables_become_one_with_lines_and_a_picture(tables, capsys):
    output = tables / "out" / "fit"
    assert main([str(tables / "one"), str(tables / "two"), "--output", str(output)]) == 0
    text = (output / "scaling.md").read_text()
    assert text == capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert rows[2] == ["one", "r1_of_1", "1", "10", "1.000", "31.00", "2.48", "3", "", ""]
    assert rows[6] == ["two", "r2", "100", "20", "2.000", "waiting", "", "", "16.1", "2.0"]
    assert rows[9] == ["one", "1", "+10.00", "+10.00 to +10.00", "0.82", "6", "3"]
    assert rows[10][:3] == ["one", "100", "+2.00"]
    found = json.loads((output / "scaling.json").read_text())
    assert [(fit["table"], fit["fraction"], round(fit["at_one"], 3)) for fit in found["fits"]] == [
        ("one", 0.01, 0.51), ("one", 1.0, 0.85)
    ]  # fmt: skip
    with Image.open(output / "scaling.png") as picture:
        assert picture.width > 600 and len(picture.getcolors(1 << 20)) > 10


def test_a_table_that_is_only_planned_has_no_line(tables, capsys):
    assert main([str(tables / "two"), "--output", str(tables / "fit")]) == 0
    assert "No line: that takes two trained shares" in capsys.readouterr().out
    assert (tables / "fit" / "scaling.png").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "expected vltrain scaling TABLE"),
        (["one"], "expected vltrain scaling TABLE"),
        (["gone", "--output", "x"], "gone/table.json: no such file"),
        (["one", "one", "--output", "x"], "tables of one name (one, one)"),
        (["one", "--output", "two"], "exists already"),
        (["bad", "--output", "x"], "bad/table.json: not a table of vltrain ablate"),
        (["one", "--output", "x", "--seed", "1"], "--seed"),
    ],
)
def test_a_mistake_ends_with_one_line(tables, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tables)
    (tables / "bad").mkdir()
    (tables / "bad" / "table.json").write_text('{"rows": [{"row": "a"}]}')
    assert main(words) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1 and not (tables / "x").exists()
