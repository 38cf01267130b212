"""Early stopping and the best checkpoint: decided by the evaluations, and again in the same way by a run that goes on."""

import pytest

from vltrain.config import TrainConfig
from vltrain.errors import InputError
from vltrain.train.selection import Selection, name_best


def test_patience_counts_evaluations_that_are_not_better():
    selection = Selection(patience=2)
    taken = [(selection.take(step, figure), selection.exhausted) for step, figure in ((10, 0.5), (20, 0.5), (30, 0.6), (40, 0.1), (50, 0.6))]
    assert taken == [(True, False), (False, False), (True, False), (False, False), (False, True)]
    assert (selection.best, selection.best_step) == (0.6, 30)


def test_its_state_goes_through_a_checkpoint_exactly():
    selection = Selection(patience=3)
    selection.take(1, 0.1 + 0.2)
    selection.take(2, 0.0)
    again = Selection(patience=3)
    again.load(selection.state())
    assert again == selection
    assert not again.take(3, 0.1 + 0.2) and again.take(4, 0.31)


def test_without_patience_nothing_is_exhausted():
    selection = Selection()
    assert not any(selection.take(step, 0.0) and selection.exhausted for step in range(50)) and not selection.exhausted


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
