"""Padded batches of an encoder-decoder against what makes them right: every sample once, never over the budget, little
padding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vltrain.data.batching import batch_lengths

BUDGET = 120
samples = st.lists(st.tuples(st.integers(1, 80), st.integers(1, 40), st.integers(0, 3)), max_size=60)


def batches(order, starts):
    return [order[first:last] for first, last in zip(starts[:-1], starts[1:], strict=True)]


@given(samples, st.integers(0, 3), st.sampled_from([None, 3, 4]))
def test_every_sample_comes_once_and_no_batch_is_over_its_bounds(drawn, seed, max_images):
    prompts, answers, images = (np.array([sample[place] for sample in drawn], np.int64) for place in range(3))
    order, starts = batch_lengths(prompts, answers, BUDGET, images, max_images, seed)
    assert sorted(order.tolist()) == list(range(len(drawn))) and starts[0] == 0 and starts[-1] == len(drawn)
    for batch in batches(order, starts):
        assert len(batch) and len(batch) * (prompts[batch].max() + answers[batch].max()) <= BUDGET
        assert max_images is None or images[batch].sum() <= max_images
    again = batch_lengths(prompts, answers, BUDGET, images, max_images, seed)
    assert np.array_equal(order, again[0]) and np.array_equal(starts, again[1])


def test_little_is_padded_and_seeds_deal_differently():
    generator = np.random.default_rng(0)
    prompts, answers = generator.integers(40, 400, 3000), generator.integers(2, 12, 3000)
    order, starts = batch_lengths(prompts, answers, 4096, seed=1)
    room = sum(len(batch) * int(prompts[batch].max() + answers[batch].max()) for batch in batches(order, starts))
    assert (prompts + answers).sum() / room > 0.95
    assert not np.array_equal(order, batch_lengths(prompts, answers, 4096, seed=2)[0])


def test_a_sample_that_fits_no_batch_is_the_callers_mistake():
    with pytest.raises(AssertionError):
        batch_lengths(np.array([100]), np.array([21]), BUDGET)
