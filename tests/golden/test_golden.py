"""Ten steps of every kind give the losses that are kept, see `tests.golden`."""

import pytest

from tests.golden.runs import BLIP, MMT, STEPS, difference, kept, losses_now

NAMES = [
    *(f"mmt, {name}" for name in MMT),
    *(f"instructblip with {llm}, {name}" for llm in ("llama", "t5") for name in BLIP),
]
TOLERANCE = 1e-5  # fp32 on another CPU: sums are taken in another order


@pytest.fixture(scope="module")
def now(tmp_path_factory):
    return losses_now(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_the_kept_ones(name, now):
    assert difference(now[name], kept()[name]) < TOLERANCE


def test_what_is_kept_would_show_a_change():
    """Each run learns, no two are alike, and a loss in the fifth digit is a difference."""
    losses = {name: values["losses"] for name, values in kept().items()}
    assert set(losses) == set(NAMES) and all(
        len(values) == STEPS and values[-1] != values[0] for values in losses.values()
    )
    ends = sorted(values[-1] for values in losses.values())
    assert len({f"{end:.9f}" for end in ends}) >= len(ends) - 1  # checkpointing changes nothing
    expected = kept()["mmt, bottleneck"]
    assert (
        difference({**expected, "losses": [value * (1 + 3e-5) for value in expected["losses"]]}, expected) > TOLERANCE
    )
