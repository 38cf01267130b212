"""Which samples share a batch of an encoder-decoder: padded rows by a budget of tokens.

T5 adds a bias by the distance of two places in a row, so samples cannot stand one after another in it as they do in a
LLaMA's packs: each is a row of its own, padded to the batch's longest prompt and longest answer. Samples of similar
lengths share a batch, so that little is padded; they are drawn from a random window, so that a batch is not of one
kind. Trade-off: a few per cent of the budget, as padding.
"""

from __future__ import annotations

import numpy as np

WINDOW = 4096  # samples that are sorted by length together


def batch_lengths(
    prompts: np.ndarray,
    answers: np.ndarray,
    budget: int,
    images: np.ndarray | None = None,
    max_images: int | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Deals samples to batches whose rows, times the longest prompt plus the longest answer of them, stay within the
    budget.

    Args:
        prompts, answers: int [n], tokens that the encoder reads and the decoder predicts; a sample's sum is at most
            `budget`.
        budget: tokens of a batch, padding included.
        images, max_images: as in `vltrain.data.packing.pack_lengths`.
        seed: the same arguments and seed give the same batches.

    Returns: order int64 [n] and row_starts int64 [batches + 1], as `vltrain.data.packing.pack_lengths`.
    """
    prompts, answers = np.asarray(prompts, np.int64), np.asarray(answers, np.int64)
    assert len(prompts) == len(answers) and (prompts + answers <= budget).all()
    bound = np.iinfo(np.int64).max if max_images is None else max_images
    shown = np.zeros(len(prompts), np.int64) if images is None else np.asarray(images, np.int64)
    shuffled = np.random.default_rng(seed).permutation(len(prompts))
    order = np.concatenate(
        [window[np.lexsort((answers[window], prompts[window]))] for window in _windows(shuffled)] or [shuffled]
    )
    starts = [0]
    longest_prompt = longest_answer = num_images = 0
    for place, sample in enumerate(order.tolist()):
        longest_prompt, longest_answer = (
            max(longest_prompt, int(prompts[sample])),
            max(longest_answer, int(answers[sample])),
        )
        num_images += int(shown[sample])
        rows = place - starts[-1] + 1
        if rows > 1 and (rows * (longest_prompt + longest_answer) > budget or num_images > bound):
            starts.append(place)
            longest_prompt, longest_answer, num_images = int(prompts[sample]), int(answers[sample]), int(shown[sample])
    return order, np.array([*starts, len(order)] if len(order) else [0], np.int64)


def _windows(samples: np.ndarray) -> list[np.ndarray]:
    return [samples[first : first + WINDOW] for first in range(0, len(samples), WINDOW)]
