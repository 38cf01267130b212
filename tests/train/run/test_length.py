"""What a run's length says of itself before it begins; what is refused is among the attacks
(tests/attacks/scorers.py)."""

import pytest

from vltrain.config.schema import Config, DataConfig, EvalConfig
from vltrain.data.stream.mixing import Mixing
from vltrain.train.run.length import require_reachable


@pytest.mark.parametrize(
    "split, scorer, is_told", [("train", "exact", True), ("val", "exact", False), ("train", None, False)]
)
def test_evaluation_on_what_is_trained_on_is_told(split, scorer, is_told, caplog):
    with caplog.at_level("WARNING"):
        require_reachable(
            Config(data=DataConfig(eval_split=split), eval=EvalConfig(scorer=scorer)),
            Mixing.alone(10),
            1,
            resumed=False,
        )
    assert ("is what is trained on" in caplog.text) == is_told
