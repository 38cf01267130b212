"""What a run draws of itself: norms of its trained weights, whatever ZeRO stage and ranks, over all of its lives."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, tiny_config, write_packs
from vltrain.errors import InputError
from vltrain.models.build import build_model
from vltrain.train.pictures.norms import NORMS, draw_norms, layer_of, read_norms

CHANGES = {
    "train__packs_per_step": 2,
    "train__max_steps": 6,
    "train__epochs": 10.0,
    "train__save_every_steps": 3,
    "train__log_every_steps": 2,
}


def by_layer(weights: dict) -> dict[str, float]:
    """A plain loop over whole weights."""
    squares: dict[str, float] = {}
    for key, weight in weights.items():
        if key.startswith("weight/"):
            layer = layer_of(key.removeprefix("weight/"))
            squares[layer] = squares.get(layer, 0.0) + float((weight.double() ** 2).sum())
    return {layer: math.sqrt(square) for layer, square in squares.items()}


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_norms_are_those_of_the_whole_weights(tmp_path, world_size):
    """Of ranks that hold parts of them."""
    packs = write_packs(tmp_path / "packs", make_segments(8))
    told = [
        {
            "packs": str(packs),
            "ds": {"zero_optimization": {"stage": stage}},
            "output": str(tmp_path / f"{stage}"),
            "changes": CHANGES,
        }
        for stage in (2, 3)
    ]
    (tmp_path / "scenarios.json").write_text(json.dumps(told))
    run_ranks("tests.train.worker", [str(tmp_path / "scenarios.json")], world_size, tmp_path / "log")
    for scenario in told:
        folder = tmp_path / str(scenario["ds"]["zero_optimization"]["stage"])
        norms = read_norms(folder / NORMS)
        assert list(norms) == [1, 3, 5]
        expected = by_layer(load_file(folder / "result.safetensors"))
        assert norms[5] == {layer: pytest.approx(norm, rel=1e-6) for layer, norm in expected.items()}
    names = [name for name, one in build_model(tiny_config().model).named_parameters() if one.requires_grad]
    assert list(norms[5]) == list(dict.fromkeys(map(layer_of, names)))


def test_a_run_that_goes_on_keeps_what_was_before(tmp_path):
    packs = write_packs(tmp_path / "packs", make_segments(8))
    told = {"packs": str(packs), "ds": {"zero_optimization": {"stage": 2}}}
    whole = {**told, "output": str(tmp_path / "whole"), "changes": CHANGES}
    cut = {**told, "output": str(tmp_path / "cut"), "changes": CHANGES}
    (tmp_path / "scenarios.json").write_text(json.dumps([whole, cut]))
    run_ranks("tests.train.worker", [str(tmp_path / "scenarios.json")], 1, tmp_path / "log")
    folder = tmp_path / "cut"
    # As a life that was killed after step 5, whose newest checkpoint is of step 3, left it.
    for name in ("step-00000006", "latest"):
        path = folder / "checkpoints" / name
        (path.rename(tmp_path / name) if path.is_dir() else path.unlink())
    (tmp_path / "again.json").write_text(json.dumps([{**cut, "resume": True}]))
    run_ranks("tests.train.worker", [str(tmp_path / "again.json")], 1, tmp_path / "log2")
    assert read_norms(folder / NORMS) == read_norms(tmp_path / "whole" / NORMS)


def test_a_layer_by_the_name_of_a_parameter():
    assert layer_of("llm.model.layers.3.mlp.adapter.down_weight") == "llm.model 3"
    assert layer_of("llm.encoder.block.0.layer.1.x") == "llm.encoder 0"
    assert layer_of("neck.down.weight") == "neck" and layer_of("modality_embedding") == "modality_embedding"


def test_the_heat_map_shows_growth():
    norms = {step: {"a": 2.0 + step, "b": 0.0} for step in range(0, 300, 2)}
    axes = draw_norms(norms).axes[0]
    values = np.asarray(axes.images[0].get_array())
    assert values.shape == (2, 120) and values[0, 0] == 1 and values[0, -1] == (2 + 298) / 2
    assert np.isnan(values[1].astype(float)).all(), "of what was zero no growth can be told"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_a_changed_file_is_refused(tmp_path):
    (tmp_path / NORMS).write_text('{"step": 1, "norms": 3}\n')
    with pytest.raises(InputError, match="expected step and norms"):
        read_norms(tmp_path / NORMS)
