"""What a split that measures has in common with what is trained on, and what the training samples repeat.

Some overlap comes by itself: questions are made by templates, one photo is uploaded twice, a data set is split at
random by question. Then the test repeats training samples as often as these repeat each other, and nothing is said
against it. A test that stands in the training data is repeated more often than that: `_is_more_than_chance`, with the
training samples' own share of repeats as the chance, three standard deviations of a Poisson number and one for small
sets.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

from vltrain.data.report.alike import Alike
from vltrain.data.report.finding import FAILED, OK, WARNING, Finding, share, some
from vltrain.data.report.samples import Split

MANY = 0.05
"""Share of repeats from which on they are worth a look, whatever chance gives."""


def _is_more_than_chance(found: int, number: int, repeated: int, trained: int) -> bool:
    """Whether `found` of `number` are too many, where `repeated` of `trained` repeat each other."""
    expected = number * (repeated + 1) / (trained + 1)
    return found > expected + 3 * math.sqrt(expected) + 1


def repeats(train: Split, alike: Alike) -> Finding:
    """Samples of a split that say the same about the same images, or nearly, and those that say it differently."""
    exact, near = (
        [(key, said) for key, said in zip(keys, train.said, strict=True)]
        for keys in (alike.exact_keys(train), alike.near_keys(train))
    )
    number, num_exact, num_near = len(train), _num_beyond_first(exact), _num_beyond_first(near)
    first_said: dict[Hashable, tuple[int, str]] = {}
    contrary: list[str] = []
    pairs: list[str] = []
    for (key, said), name in zip(exact, train.ids, strict=True):
        before, earlier = first_said.setdefault(key, (said, name))
        if earlier == name:
            continue
        (pairs if before == said else contrary).append(f"{earlier} and {name}")
    told = f"{num_exact:,} of {number:,} repeat another's question, images and answer ({share(num_exact, number)})"
    told += f", {num_near - num_exact:,} more nearly do" if num_near > num_exact else ""
    if contrary:
        told += f"; {len(contrary):,} answer otherwise what another asks about the same images"
    many = num_near > MANY * number or len(contrary) > MANY * number
    if many:
        told += "; they count as often in the loss: is that meant?"
    shown = some(contrary or pairs)
    return Finding(status=WARNING if many else OK, what="repeated samples", found=told, examples=shown if many else ())


def _num_beyond_first(keys: Sequence[Hashable]) -> int:
    return len(keys) - len(set(keys))


def overlaps(train: Split, other: Split, alike: Alike) -> list[Finding]:
    """Samples and images of `other` that stand in `train`."""
    return [_same_samples(train, other, alike), *_same_images(train, other, alike)]


def _same_samples(train: Split, other: Split, alike: Alike) -> Finding:
    kinds = [(alike.exact_keys(train), alike.exact_keys(other)), (alike.near_keys(train), alike.near_keys(other))]
    (same, _, same_failed), (found, repeated, failed) = (
        _shared(trained, asked, len(train), len(other)) for trained, asked in kinds
    )
    trained, asked = kinds[1]
    named = dict(zip(trained, train.ids, strict=True))
    number = len(other)
    told = (
        f"{found:,} of {number:,} ask what a training sample asks about the same image(s) or none ("
        f"{share(found, number)}; {same:,} word for word and byte for byte); of training samples "
        f"{share(repeated, len(train))} repeat another"
    )
    failed = failed or same_failed
    if failed:
        told += (
            f": more than chance gives, so samples of '{other.name}' are trained on; take them out of '{train.name}'"
        )
    status = FAILED if failed else WARNING if found > MANY * number else OK
    examples = some(f"{name} is {named[key]}" for key, name in zip(asked, other.ids, strict=True) if key in named)
    return Finding(status=status, what=f"'{other.name}' asked in '{train.name}'", found=told, examples=examples)


def _shared(
    trained: Sequence[Hashable], others: Sequence[Hashable], num_trained: int, number: int
) -> tuple[int, int, bool]:
    """How many of `others` are in `trained`, how many of those repeat each other, and whether it is too many."""
    counts = Counter(trained)
    found, repeated = sum(one in counts for one in others), sum(counts[one] > 1 for one in trained)
    return found, repeated, _is_more_than_chance(found, number, repeated, num_trained)


def _same_images(train: Split, other: Split, alike: Alike) -> list[Finding]:
    """By the files of images: where most are the training samples' own, the data was split by question, which is
    told."""
    ours, theirs = alike.shown_by[train.name], alike.shown_by[other.name]
    if not ours or not theirs:
        return []
    number = len(theirs)
    (same, _, same_failed), (found, repeated, failed) = (
        _shared([classes[one] for one in ours], [classes[one] for one in theirs], len(ours), number)
        for classes in (alike.bytes_of, alike.looks_of)
    )
    told = (
        f"{found:,} of {number:,} are trained on ({share(found, number)}; {same:,} byte for byte, the others look the "
        f"same); of training images {share(repeated, len(ours))} repeat another"
    )
    failed = failed or same_failed
    by_question = 2 * len(set(ours).intersection(theirs)) >= number
    if by_question:
        told += f": '{train.name}' and '{other.name}' ask about the same images; split by image to measure on new ones"
    elif failed:
        told += f": more than chance gives, so images of '{other.name}' are trained on; take them out of '{train.name}'"
    status = WARNING if by_question else FAILED if failed else WARNING if found > MANY * number else OK
    what = f"images of '{other.name}' in '{train.name}'"
    return [Finding(status=status, what=what, found=told, examples=_examples(train, other, alike) if found else ())]


def _examples(train: Split, other: Split, alike: Alike) -> tuple[str, ...]:
    """Which sample shows what which training sample shows; each image once."""
    first: dict[int, str] = {}
    for name, files in zip(train.ids, train.images, strict=True):
        for file in files:
            first.setdefault(alike.looks_of[alike.numbers[file]], name)
    met: dict[int, str] = {}
    for name, files in zip(other.ids, other.images, strict=True):
        for file in files:
            number = alike.looks_of[alike.numbers[file]]
            if number in first:
                met.setdefault(number, name)
    return some(f"{name} shows what {first[number]} does" for number, name in met.items())
