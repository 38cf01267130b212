"""`vltrain importance` of several runs: their agreement against what is counted by hand, means over seeds, and what
is refused."""

import csv
import json

import numpy as np
import pytest
import torch

from vltrain.errors import InputError
from vltrain.programs.importance import program
from vltrain.programs.importance.agreement import RunRanks, agreement, grouped, overlap, require_comparable, spearman
from vltrain.train.pictures.ranks import ranks_of

LAYERS = [
    f"qformer.encoder.layer.{block}.{matrix}"
    for block in range(2)
    for matrix in ("attention.attention.query", "crossattention.attention.key", "intermediate.dense")
]
INITIAL, TARGET = 4, 2


def run_of(folder, counts, *, seed=0, shift=0):
    """Of layer i the `counts[i]` directions from `shift` on are kept."""
    kept = {}
    for layer, count in zip(LAYERS, counts, strict=True):
        kept[layer] = torch.zeros(INITIAL, dtype=torch.bool)
        kept[layer][[(shift + place) % INITIAL for place in range(count)]] = True
    return RunRanks(folder=folder, ranks=ranks_of(kept), kept=kept, target=TARGET * len(LAYERS), start=seed)


def test_spearman_is_the_correlation_of_places():
    first, second = [1, 4, 4, 2, 0, 7, 7, 7], [2, 2, 5, 1, 0.5, 3, 9, 3]
    places = [[2, 4.5, 4.5, 3, 1, 7, 7, 7], [3.5, 3.5, 7, 2, 1, 5.5, 8, 5.5]]  # counted by hand, equal ones share
    assert spearman(first, second) == pytest.approx(np.corrcoef(places)[0, 1], abs=1e-12)
    assert spearman(first, first) == pytest.approx(1) and spearman([1, 1], [1, 2]) is None


def test_the_overlap_is_of_directions_that_began_as_the_same(tmp_path):
    # the last block's text FFN, of which nothing reaches the loss, does not count
    first = run_of(tmp_path / "a", [4, 2, 0, 2, 1, 3])
    same, other = run_of(tmp_path / "b", [2, 2, 2, 2, 2, 2], shift=1), run_of(tmp_path / "c", [2] * 6, seed=1)
    found = overlap(first, same)
    # kept by both: of 4 and {1, 2} 2; of {0, 1} and {1, 2} 1; 0; 1; of {0} and {1, 2} 0; of 9 and 10
    assert found == {"kept_by_both": 4 / 9, "by_chance": pytest.approx((8 + 4 + 0 + 4 + 2) / 4 / 9)}
    assert overlap(first, other) is None


def test_seeds_of_a_row_are_one_group_and_tasks_are_set_beside_them(tmp_path, monkeypatch, capsys):
    runs = {
        tmp_path / "all" / "seed-0": [4, 2, 0, 2, 1, 3],
        tmp_path / "all" / "seed-1": [4, 3, 0, 1, 1, 3],
        tmp_path / "shapes": [0, 2, 4, 1, 2, 3],
    }
    read = {folder: run_of(folder, counts, seed=number) for number, (folder, counts) in enumerate(runs.items())}
    monkeypatch.setattr(program, "read_run", lambda run, named: (read[run], 7))
    assert program.main([*map(str, runs), "--output", str(tmp_path / "ranks")]) == 0
    told = json.loads((tmp_path / "ranks" / "agreement.json").read_text())
    assert told["runs"] == {"all": [str(one) for one in list(runs)[:2]], "shapes": [str(tmp_path / "shapes")]}
    (between,) = told["between"]
    assert between["spearman"] == pytest.approx(spearman([4, 2.5, 0, 1.5, 1], [0, 2, 4, 1, 2]))
    single = [spearman(counts, [0, 2, 4, 1, 2]) or 0.0 for counts in ([4, 2, 0, 2, 1], [4, 3, 0, 1, 1])]
    assert between["spearman_by_run"] == pytest.approx(sum(single) / 2) and between["overlap"] is None
    assert told["within"] == {"all": pytest.approx(spearman([4, 2, 0, 2, 1], [4, 3, 0, 1, 1]))}
    with (tmp_path / "ranks" / "ranks.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert (
        len(lines) == 2 * len(LAYERS) and lines[1]["kept"] == "2.5" and float(lines[1]["sd"]) == pytest.approx(0.5**0.5)
    )
    assert lines[-1]["run"] == "shapes" and lines[-1]["sd"] == "" and lines[-1]["gradient"] == "none"
    assert (tmp_path / "ranks" / "ranks.png").stat().st_size > 1000
    assert f"all and shapes: {between['spearman']:.3f}" in capsys.readouterr().out


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [run_of(tmp_path / place / "r4", [2] * 6) for place in ("a", "b")]
    assert list(grouped(runs)) == [str(run.folder) for run in runs]
    assert agreement(grouped(runs))["between"][0]["spearman"] is None, "all ranks are equal"


def test_what_cannot_be_compared_is_refused(tmp_path):
    whole = run_of(tmp_path / "a", [2] * 6)
    with pytest.raises(InputError, match="a: found twice"):
        require_comparable([whole, whole])
    with pytest.raises(InputError, match="b: 13 directions are left and its schedule ends at 12: it is still pruning"):
        require_comparable([whole, run_of(tmp_path / "b", [2, 2, 2, 2, 2, 3])])
    fewer = dict(list(run_of(tmp_path / "c", [3] * 6).kept.items())[:4])
    other = RunRanks(folder=tmp_path / "c", ranks=ranks_of(fewer), kept=fewer, target=12, start=0)
    with pytest.raises(InputError, match="began with none, that of .*a with rank 4"):
        require_comparable([whole, other])
