"""Early stopping and the best checkpoint: decided by the evaluations, and again in the same way by a run that goes
on."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, write_packs
from vltrain.config.older_runs import as_begun
from vltrain.config.schema import Config, TrainConfig
from vltrain.errors import InputError
from vltrain.inference.run import choose_checkpoint
from vltrain.receipts.verify import prove
from vltrain.train.checkpoints.selection import (
    BestTracker,
    evaluated_as,
    measured_by,
    name_best,
    require_same_figures,
)


def test_patience_counts_evaluations_that_are_not_better():
    selection = BestTracker(patience=2)
    taken = [
        (selection.update(step, figure), selection.exhausted)
        for step, figure in ((10, 0.5), (20, 0.5), (30, 0.6), (40, 0.1), (50, 0.6))
    ]
    assert taken == [(True, False), (False, False), (True, False), (False, False), (False, True)]
    assert (selection.best, selection.best_step) == (0.6, 30)


def test_its_state_goes_through_a_checkpoint_exactly():
    selection = BestTracker(patience=3)
    selection.update(1, 0.1 + 0.2)
    selection.update(2, 0.0)
    again = BestTracker(patience=3)
    again.load(selection.state())
    assert again == selection
    assert not again.update(3, 0.1 + 0.2) and again.update(4, 0.31)


def test_without_patience_nothing_is_exhausted():
    selection = BestTracker()
    assert (
        not any(selection.update(step, 0.0) and selection.exhausted for step in range(50)) and not selection.exhausted
    )


@pytest.mark.parametrize("changes", [{"keep_best": True}, {"early_stopping_patience": 2}])
def test_without_evaluations_they_have_no_effect(changes):
    with pytest.raises(InputError, match="no effect"):
        TrainConfig(**changes)
    TrainConfig(**changes, eval_every_steps=5)


def test_the_pointer_names_the_best(tmp_path):
    (tmp_path / "step-00000030").mkdir()
    name_best(tmp_path, 30)
    name_best(tmp_path, 30)
    assert (tmp_path / "best").read_text() == "step-00000030\n"


def test_a_run_of_a_version_that_spread_questions_evenly_goes_on_with_the_same_ones():
    config = Config(train=TrainConfig(keep_best=True, eval_every_steps=2))
    measured = measured_by(config)
    assert measured.pop("eval.spread") == "drawn"
    state = BestTracker(best=0.5, best_step=2, measured_by=measured).state()
    begun = {"train": {}, **evaluated_as({"selection": state})}
    on = as_begun(config, begun, ())
    assert on.eval.spread == "even" and as_begun(config, begun, ("eval.spread",)) == config
    require_same_figures(state, on, "checkpoint")
    with pytest.raises(InputError, match="eval.spread was 'even', is 'drawn'"):
        require_same_figures(state, config, "checkpoint")
    for now, best in ((on, 0.5), (config, None)):
        tracker = BestTracker(measured_by=measured_by(now))
        tracker.load(state)
        assert tracker.best == best
    new = BestTracker(measured_by=measured_by(config)).state()
    assert as_begun(config, evaluated_as({"selection": new}), ()) == config
    assert as_begun(config, evaluated_as({}), ()) == config


FIGURES = {"4": 0.25, "8": 0.5, "12": 0.5, "16": 0.125, "20": 0.75, "24": 0.875}


def scenario(tmp_path, name, **more):
    changes = {
        "train__packs_per_step": 2,
        "train__max_steps": 24,
        "train__epochs": 20.0,
        "train__save_every_steps": 3,
        "train__eval_every_steps": 4,
        "train__keep_best": True,
        "train__keep_checkpoints": 1,
        "train__early_stopping_patience": 2,
    }
    told = {
        "name": name,
        "packs": str(tmp_path / "packs"),
        "output": str(tmp_path / name),
        "ds": {"zero_optimization": {"stage": 2}},
    }
    return {**told, "changes": changes, "figures": FIGURES, "resume": True, **more}


def test_a_run_that_dies_between_save_and_evaluation_stops_where_it_would_have(tmp_path):
    """Real engines, one process: a whole run, one that dies in two evaluations, and one that saves in the
    background."""
    write_packs(tmp_path / "packs", make_segments(6))
    broken = [
        scenario(tmp_path, "broken", dies_in=8),
        scenario(tmp_path, "broken", dies_in=12),
        scenario(tmp_path, "broken"),
    ]
    finished = scenario(tmp_path, "broken")  # once more: it is done already
    background = scenario(tmp_path, "background")
    background["changes"]["train__async_save"] = True
    file = tmp_path / "scenarios.json"
    file.write_text(json.dumps([scenario(tmp_path, "whole"), *broken, finished, background]))
    run_ranks("tests.train.checkpoints.selection_worker", [str(file)], 1, tmp_path / "log")
    for name, evaluated in (
        ("whole", [4, 8, 12, 16]),
        ("broken", [4, 8, 8, 12, 12, 16, 16]),
        ("background", [4, 8, 12, 16]),
    ):
        run = tmp_path / name
        assert [int(line) for line in (run / "evaluated.jsonl").read_text().split()] == evaluated
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert names == ["best", "latest", "step-00000008", "step-00000016"]
        assert (run / "checkpoints" / "best").read_text() == "step-00000008\n"
        assert (run / "receipt.jsonl").read_bytes() == (tmp_path / "whole" / "receipt.jsonl").read_bytes()
        assert prove(run, None, tmp_path / "whole").failures == []
        found, expected = load_file(run / "result.safetensors"), load_file(tmp_path / "whole" / "result.safetensors")
        assert all(torch.equal(found[key], expected[key]) for key in expected if not key.startswith("gradient/"))
    best = choose_checkpoint(tmp_path / "whole", "best")
    assert (
        best.step == 8
        and best.run_state["selection"].items() >= {"best": (0.25).hex(), "best_step": 4, "stale": 0}.items()
    )
    with pytest.raises(InputError, match="no best checkpoint"):
        choose_checkpoint(tmp_path, "best")
