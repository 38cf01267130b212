"""The schedule in closed form, and which parameter goes into which group."""

import math

import pytest
import torch

from vltrain.config.schema import OptimConfig
from vltrain.train.optim import lr_factor, parameter_groups, set_learning_rates


def test_warm_up_rises_in_equal_parts_to_the_peak():
    factors = [lr_factor(step, 100, 4, 0.0) for step in range(5)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_cosine_is_half_in_the_middle_and_ends_at_the_minimum():
    assert lr_factor(60, 110, 10, 0.0) == pytest.approx(0.5)
    assert lr_factor(60, 110, 10, 0.2) == pytest.approx(0.6)
    assert lr_factor(110, 110, 10, 0.1) == pytest.approx(0.1)
    assert lr_factor(35, 110, 10, 0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_the_whole_run_may_be_warm_up():
    assert lr_factor(9, 10, 20, 0.0) == pytest.approx(10 / 21)


def test_groups_split_by_decay_and_part():
    def parameter(*shape):
        return torch.nn.Parameter(torch.zeros(*shape))

    named = {
        "adapter.up.weight": parameter(3, 2),
        "adapter.up.bias": parameter(3),
        "vision.w": parameter(2, 2),
        "vision.b": parameter(2),
        "projector.w": parameter(2, 2),
        "frozen": torch.nn.Parameter(torch.zeros(4, 4), requires_grad=False),
    }
    optim = OptimConfig(lr=1e-2, vision_lr=1e-3, projector_lr=2e-3, weight_decay=0.02)
    groups = parameter_groups(named.items(), optim, lambda name: name.split(".")[0])
    found = {(group["peak_lr"], group["weight_decay"]): [id(p) for p in group["params"]] for group in groups}
    assert found == {
        (1e-2, 0.02): [id(named["adapter.up.weight"])],
        (1e-2, 0.0): [id(named["adapter.up.bias"])],
        (2e-3, 0.02): [id(named["projector.w"])],
        (1e-3, 0.02): [id(named["vision.w"])],
        (1e-3, 0.0): [id(named["vision.b"])],
    }
    optimizer = torch.optim.AdamW(groups)
    assert set_learning_rates(optimizer, 0.5) == pytest.approx(5e-3)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([5e-4, 1e-3, 5e-3])


def test_a_linear_decay_goes_by_steps_or_by_epochs():
    assert [lr_factor(step, 6, 2, 0.2, "linear") for step in range(6)] == pytest.approx(
        [1 / 3, 2 / 3, 1.0, 0.8, 0.6, 0.4]
    )
    found = [lr_factor(step, 8, 0, 0.0, "linear_epochs", steps_per_epoch=2.5) for step in range(8)]
    assert found == pytest.approx([1.0] * 3 + [0.75] * 2 + [0.5] * 3)
    assert lr_factor(0, 8, 1, 0.1, "linear_epochs", steps_per_epoch=4) == pytest.approx(0.5)
    assert lr_factor(7, 8, 1, 0.1, "linear_epochs", steps_per_epoch=4) == pytest.approx(0.55)
