"""Packed = alone: positions, embeddings, states, losses and gradient of a packed row against each of its segments by
transformers' own forward, and where they part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vltrain.audit.checks.compare import apart, worst_named, worst_row
from vltrain.audit.findings import BOUND, Finding, compared
from vltrain.audit.samples import with_other_text
from vltrain.audit.subject import Reference, Subject
from vltrain.audit.trace import Trace, by_segment, final_states, traced
from vltrain.schema import Segment


@dataclass(kw_only=True)
class Outcome:
    """What a model made of segments: by segment final states [L, d], summed losses and, where they are known, positions
    [R, L] and embeddings [L, d]; by layer (its name, states of each segment); the gradient of the losses' sum by our
    names."""

    states: list[Tensor]
    losses: list[float]
    loss_sum: float
    positions: list[Tensor] | None = None
    embeds: list[Tensor] | None = None
    layers: list[tuple[str, list[Tensor]]] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def packed_outcome(subject: Subject, segments: Sequence[Segment]) -> Outcome:
    """Of one packed row."""
    model, apart_ = subject.model, subject.reference.num_apart
    model.zero_grad(set_to_none=True)
    with traced(model.llm) as trace:
        output = model(subject.row(segments))
    output.loss_sum.backward()
    packed = len(trace.stacks) == 1
    reads = trace.stacks[0].reads
    positions = trace.positions.flatten(0, -2) if packed and trace.positions is not None else None
    lengths = [len(one.input_ids) for one in segments]
    return Outcome(
        states=final_states(trace, segments, apart_),
        losses=output.segment_losses.tolist(),
        loss_sum=output.loss_sum.item(),
        positions=None if positions is None else [one[:, apart_:] for one in positions.split(lengths, dim=-1)],
        embeds=None if trace.embeds is None else by_segment(trace.embeds, reads, segments, apart_),
        layers=_layers(trace, segments, apart_),
        gradients=gradients_of(subject),
    )


def reference_outcome(subject: Subject, segments: Sequence[Segment]) -> Outcome:
    """Of each segment alone, by transformers' own classes; the loss is cross-entropy of their logits."""
    reference = subject.reference
    reference.zero_grad(set_to_none=True)
    found, traces = [], []
    for segment in segments:
        with traced(reference.llm) as trace:
            loss = loss_of(reference, segment)
        if segment.loss_mask.any() and loss.requires_grad:
            loss.backward()
        found.append(loss.item())
        traces.append(trace)
    first = traces[0]
    names = [name for name, _ in _layers(first, segments[:1], 0, cut=False)]
    layers = [[of[1][0] for of in _layers(trace, [one], 0, cut=False)] for trace, one in zip(traces, segments)]
    with_positions = all(one.positions is not None for one in traces) and len(first.stacks) == 1
    return Outcome(
        states=[torch.cat([trace.outputs[number, len(stack.layers)][0] for number, stack in enumerate(trace.stacks)])
                for trace in traces],
        losses=found,
        loss_sum=sum(found),
        positions=[one.positions.flatten(0, -2) for one in traces if one.positions is not None]
        if with_positions else None,
        embeds=[one.embeds[0] for one in traces if one.embeds is not None]
        if all(one.embeds is not None for one in traces) else None,
        layers=[(name, list(states)) for name, states in zip(names, zip(*layers, strict=True), strict=True)],
        gradients={name: one.grad for name, one in subject.paired.items() if one.grad is not None},
    )  # fmt: skip


def loss_of(reference: Reference, segment: Segment) -> Tensor:
    """The summed loss of a segment alone."""
    targets = torch.from_numpy(segment.input_ids[segment.loss_mask]).long()
    return F.cross_entropy(reference.predictions(segment).float(), targets, reduction="sum")


def gradients_of(subject: Subject) -> dict[str, Tensor]:
    """Of the model's parameters, by name, those that are there now."""
    return {name: one.grad for name, one in subject.model.named_parameters() if one.grad is not None}


def _layers(
    trace: Trace, segments: Sequence[Segment], num_apart: int, *, cut: bool = True
) -> list[tuple[str, list[Tensor]]]:
    found = []
    for number, stack in enumerate(trace.stacks):
        kinds = getattr(getattr(stack.whole, "config", None), "layer_types", None) or ()
        for layer in range(len(stack.layers)):
            if (number, layer) in trace.outputs:
                states = trace.outputs[number, layer]
                said = f" ({kinds[layer]})" if layer < len(kinds) else ""
                of = "" if stack.reads == "all" else f" of the {'encoder' if stack.reads == 'prompt' else 'decoder'}"
                split = by_segment(states, stack.reads, segments, num_apart) if cut else [states[0]]
                found.append((f"layer {layer}{of}{said}", split))
    return found


@dataclass(kw_only=True)
class Packing:
    """findings; gradients: of the whole row, by name; free: names of a network's own parameters that its own class's
    backward does not reach."""

    findings: list[Finding]
    gradients: Mapping[str, Tensor]
    free: frozenset[str]


def check_packing(subject: Subject, *, brief: bool = False) -> Packing:
    """Findings on positions, embeddings, states, losses and gradient; `brief`: on the last two alone."""
    segments = subject.segments
    packed, alone = packed_outcome(subject, segments), reference_outcome(subject, segments)
    states, worst = worst_row(packed.states, alone.states)
    found = [*_inputs(subject, packed, alone)]
    where = found[-1].where if any(one.passed is False for one in found) else ""
    if states > BOUND and not where:
        where = _where(subject, worst, packed, alone)
    found.append(compared("states packed = alone", states, where))
    found += [_losses(subject, packed, alone, where if states > BOUND else ""), _gradients(subject, packed, alone)]
    if brief:
        found = found[-2:]
    free = {name for name in subject.trained - alone.gradients.keys() if name not in subject.added}
    return Packing(findings=found, gradients=packed.gradients, free=frozenset(free))


def _inputs(subject: Subject, packed: Outcome, alone: Outcome) -> list[Finding]:
    found = []
    if packed.positions and alone.positions and all(
        one.shape == other.shape for one, other in zip(packed.positions, alone.positions)
    ):  # fmt: skip
        wrong = [
            (number, ours, theirs)
            for number, (ours, theirs) in enumerate(zip(packed.positions, alone.positions, strict=True))
            if not torch.equal(ours, theirs)
        ]
        where = ""
        if wrong:
            number, ours, theirs = wrong[0]
            row, place = (ours != theirs).nonzero()[0].tolist()
            where = (
                f"segment {number + 1} of {len(packed.positions)}: token {place + 1} stands at {int(ours[row, place])}"
                f" instead of {int(theirs[row, place])}" + (f" in row {row + 1} of positions" if len(ours) > 1 else "")
            )
        found.append(Finding(what="positions packed = alone", passed=not wrong, bound=None, where=where))
    if packed.embeds and alone.embeds:
        size, worst = worst_row(packed.embeds, alone.embeds)
        where = _where_embedded(subject, worst, packed.embeds, alone.embeds) if size > BOUND else ""
        found.append(compared("embeddings packed = alone", size, where))
    return found


def _losses(subject: Subject, packed: Outcome, alone: Outcome, where: str) -> Finding:
    labelled = [place for place, one in enumerate(subject.segments) if one.loss_mask.any()]
    size = max(abs(packed.losses[one] - alone.losses[one]) / max(abs(alone.losses[one]), 1e-30) for one in labelled)
    whole = abs(packed.loss_sum - alone.loss_sum) / abs(alone.loss_sum)
    if size <= BOUND < whole:
        where = "each segment's loss agrees, but the row's is not their sum over labels"
    told = where or "states agree, so the head differs (bias, scale or softcap)"
    return compared("loss packed = alone", max(size, whole), told)


def _gradients(subject: Subject, packed: Outcome, alone: Outcome) -> Finding:
    size, name = worst_named(packed.gradients, alone.gradients)
    extra = sorted(
        name for name, one in packed.gradients.items() if name not in alone.gradients and bool(one.any())
    )  # fmt: skip
    if extra:
        where = f"a gradient that transformers does not have: {extra[0]}"
        return Finding(what="gradient packed = alone", passed=False, difference=size, where=where)
    scale = _common_factor(packed.gradients, alone.gradients)
    told = f"largest in {name}" if scale is None else f"all of it is {scale:.4g} times as large as transformers'"
    return compared("gradient packed = alone", size, told)


def _common_factor(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float | None:
    """What `found` is a multiple of `expected` by; None: it is none."""
    size = sum(float((one.double() ** 2).sum()) for one in expected.values())
    if not size or not expected.keys() <= found.keys():
        return None
    factor = sum(float((found[name].double() * one.double()).sum()) for name, one in expected.items()) / size
    scaled = {name: one * factor for name, one in expected.items()}
    return factor if worst_named(found, scaled)[0] <= BOUND else None


def _named(segments: Sequence[Segment], place: int) -> str:
    shown = len(segments[place].images)
    return f"segment {place + 1} of {len(segments)}" + (f", which shows {shown} image(s)," if shown else "")


def _where_embedded(subject: Subject, worst: int, found: list[Tensor], expected: list[Tensor]) -> str:
    """In words: which picture is wrong, and what stands there instead."""
    segments, model = subject.segments, subject.model
    segment, skip = segments[worst], subject.reference.num_apart
    pictures: dict[str, Tensor] = {}
    runs: dict[int, list[tuple[str, slice]]] = {}
    for number, one in enumerate(segments):
        places = (one.input_ids[skip:] == model.image_token).nonzero()[0].tolist()
        runs[number] = []
        for name, count in zip(one.images, one.image_tokens.tolist()):
            run = slice(places[0], places[0] + count)
            places = places[count:]
            runs[number].append((name, run))
            pictures.setdefault(f"{name} in segment {number + 1}", expected[number][run])
    for order, (name, run) in enumerate(runs[worst]):
        if run.stop > len(expected[worst]) or apart(found[worst][run], expected[worst][run]) <= BOUND:
            continue
        said = f"{_named(segments, worst)} image {order + 1}"
        for other, vectors in pictures.items():
            if vectors.shape == expected[worst][run].shape and apart(found[worst][run], vectors) <= BOUND:
                return f"{said}: in the place of picture {name} stands picture {other}"
        return f"{said}: its visual tokens {_alone(subject, segment, run, expected[worst][run])}"
    return f"{_named(segments, worst)} has other embeddings of text"


@torch.no_grad()
def _alone(subject: Subject, segment: Segment, run: slice, expected: Tensor) -> str:
    with traced(subject.model.llm) as trace:
        subject.model(subject.row([segment]))
    assert trace.embeds is not None
    found = by_segment(trace.embeds, trace.stacks[0].reads, [segment], subject.reference.num_apart)[0][run]
    if apart(found, expected) <= BOUND:
        return "depend on what else is in the row"
    return "are others than transformers computes, even with the segment alone: tower, adapters or what follows it"


def _where(subject: Subject, worst: int, packed: Outcome, alone: Outcome) -> str:
    """In words: the first layer that differs, and whether a segment sees its neighbours."""
    layer = ""
    for (name, ours), (_, theirs) in zip(packed.layers, alone.layers, strict=False):
        if apart(ours[worst], theirs[worst]) > BOUND:
            layer = f" from {name.partition(' (')[0]} on" + (f" ({name.partition(' (')[2]}" if " (" in name else "")
            break
    named = _named(subject.segments, worst)
    if leaking := _leaking(subject, worst):
        return f"{named} sees segment {leaking[0] + 1}{layer}"
    return f"{named} sees no neighbour, but is computed otherwise than alone{layer}: positions, windows, blocks, scales"


@torch.no_grad()
def _leaking(subject: Subject, worst: int) -> list[int]:
    """Segments whose tokens change the states of segment `worst`."""
    segments = list(subject.segments)

    def states(row: Sequence[Segment]) -> Tensor:
        with traced(subject.model.llm) as trace:
            subject.model(subject.row(row))
        return final_states(trace, row)[worst]

    before = states(segments)
    return [
        place
        for place, segment in enumerate(segments)
        if place != worst
        and apart(states([*segments[:place], with_other_text(segment), *segments[place + 1 :]]), before) > BOUND
    ]
