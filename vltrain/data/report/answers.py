"""What is answered how often, and whether the longest answers can be generated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from vltrain.data.report.finding import FAILED, OK, WARNING, Finding, quoted, share, some, spread
from vltrain.data.report.samples import Split
from vltrain.data.text.tokenizer import Tokenizer

DOMINATES = 0.8
"""Share of one answer from which on a model that always gives it looks good."""
FEW = 0.01
"""Share of a split that may be out of reach before the figure is said to be wrong."""
_SHOWN = 5


def distribution(split: Split) -> Finding:
    """The most frequent answers of a split."""
    counts = Counter(split.answers).most_common()
    (_, most), number = counts[0], len(split)
    shown = ", ".join(f"{quoted(text)} {share(count, number)}" for text, count in counts[:_SHOWN])
    told = f"{len(counts):,} distinct ones of {split.size}; {shown if most > 1 else 'each once'}"
    one_sided = most > DOMINATES * number and number > 1
    if one_sided:
        told += (
            f": who always says {quoted(counts[0][0])} is right in {share(most, number)}; judge accuracy against that"
        )
    return Finding(status=WARNING if one_sided else OK, what=f"answers of '{split.name}'", found=told)


def longest(
    split: Split,
    tokenizer: Tokenizer,
    most_tokens: int | None,
    reaches: Callable[[int, str], bool] | None,
    *,
    measured: bool,
) -> Finding:
    """Answers in tokens beside `eval.max_new_tokens`.

    Args:
        most_tokens: that an answer may have; None: as many as the references need.
        reaches: (number of the sample in the split, its answer cut at that) -> whether the scorer calls that right;
            None: it judges by degrees, or answers are not generated.
        measured: whether the split is answered, and not only trained on.
    """
    known: dict[str, list[int]] = {}
    for answer in split.answers:
        if answer not in known:
            known[answer] = tokenizer.encode(answer)
    sizes = np.array([len(known[answer]) for answer in split.answers])
    what = f"longest answers of '{split.name}'"
    told = f"tokens of an answer: {spread(sizes)}"
    if most_tokens is None:
        return Finding(status=OK, what=what, found=f"{told}; eval.max_new_tokens is as many as the references need")
    over = np.flatnonzero(sizes > most_tokens).tolist()
    lost = over
    if reaches is not None:
        lost = [
            number
            for number in over
            if not reaches(number, tokenizer.decode(known[split.answers[number]][:most_tokens]).strip())
        ]
    told += f"; {len(over):,} of {len(split):,} are longer than eval.max_new_tokens = {most_tokens}"
    if over and reaches is None:
        told += ", and would be cut"
    elif over:
        told += f", and {len(lost):,} of these are wrong when cut there" if lost else ", and right when cut there"
    status = OK
    if lost and reaches is not None:
        status = FAILED if measured and len(lost) > FEW * len(split) else WARNING
        told += f"; raise it to {int(sizes[lost].max()) + 1}, or leave it out"
    examples = some(f"{split.ids[number]} with {sizes[number]}" for number in sorted(lost, key=lambda one: -sizes[one]))
    return Finding(status=status, what=what, found=told, examples=examples if status != OK else ())
