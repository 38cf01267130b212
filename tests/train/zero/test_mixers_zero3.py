"""Mixers of tokens that run once a padded group, and experts, under ZeRO-3 with ranks that differ in their groups and
experts: no hang, and the losses and gradients of plain data parallelism."""

import pytest
import torch

from tests.support.processes import run_ranks


@pytest.mark.parametrize(
    "family, trained",
    [
        ("lfm2", "all"),
        # Nothing in front of the first mixer is trained: its input has no gradient.
        pytest.param("lfm2", "layers.0.conv", marks=pytest.mark.slow),
        *(
            pytest.param(name, "all", marks=pytest.mark.slow)
            for name in ("qwen3_next", "falcon_h1", "jamba", "gpt_oss")
        ),
        pytest.param("qwen3_next", "linear_attn", marks=pytest.mark.slow),
    ],
)
def test_ranks_with_other_groups_give_the_gradients_of_stage_0(tmp_path, family, trained):
    output = tmp_path / "found.pt"
    run_ranks("tests.train.zero.mixers_worker", [family, trained, str(output)], 2, tmp_path / "log", 120)
    found = torch.load(output)
    assert found[0].keys() == found[3].keys() and len(found[0]) > 4
    largest = max(float(one.abs().max()) for name, one in found[0].items() if "grad" in name)
    for name, expected in found[0].items():
        torch.testing.assert_close(found[3][name].view_as(expected), expected, rtol=1e-5, atol=1e-6 * largest, msg=name)
