"""Packed = alone: states, loss and gradient of a packed row against each of its segments by transformers' own forward,
and where they part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from vltrain.audit.checks.compare import apart, worst_named, worst_row
from vltrain.audit.findings import BOUND, Finding
from vltrain.audit.pieces import Piece
from vltrain.audit.subject import Outcome, Subject, Tuning, decoder_of, packed_outcome, packed_states, reference_outcome
from vltrain.batch import Batch
from vltrain.models.interface import VisionLanguageModel


def check_packing(subject: Subject) -> tuple[list[Finding], frozenset[str]]:
    """Three findings (states, losses, gradients), and names of the parameters that transformers' own backward
    reaches."""
    pieces = subject.pieces
    packed, alone = packed_outcome(subject, pieces), reference_outcome(subject, pieces)
    labelled = [place for place, piece in enumerate(pieces) if piece.num_labels]
    states, worst = worst_row(packed.states, alone.states)
    losses = max(abs(packed.losses[one] - alone.losses[one]) / max(abs(alone.losses[one]), 1e-30) for one in labelled)
    gradients, name = worst_named(packed.gradients, alone.gradients)
    extra = sorted(set(packed.gradients) - set(alone.gradients))
    where = "" if states <= BOUND else _where(subject, pieces, worst, packed, alone)
    found = [
        Finding(what="states packed = alone", passed=states <= BOUND, difference=states, where=where),
        Finding(
            what="loss packed = alone",
            passed=losses <= BOUND,
            difference=losses,
            where="" if losses <= BOUND else where or "states agree, so the head differs (bias, scale or softcap)",
        ),
        Finding(
            what="gradient packed = alone",
            passed=gradients <= BOUND and not extra,
            difference=gradients,
            where=(f"a gradient that transformers does not have: {extra[0]}" if extra else "" if gradients <= BOUND
                   else f"largest in {name}"),
        ),
    ]  # fmt: skip
    return found, frozenset(alone.gradients)


def check_alone(subject: Subject, tuning: Tuning) -> list[Finding]:
    """One finding: the trained parameters' gradient of a packed row against that of its segments one by one, each as a
    row of its own."""
    whole = gradients_of(tuning.model, [subject.row(subject.pieces)])
    alone = gradients_of(tuning.model, [subject.row([piece]) for piece in subject.pieces])
    size, name = worst_named(whole, alone)
    return [
        Finding(
            what=f"gradient packed = alone ({tuning.title})",
            passed=size <= BOUND,
            difference=size,
            where="" if size <= BOUND else f"largest in {name}",
        )
    ]


def gradients_of(model: VisionLanguageModel, rows: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """Of the summed losses of rows, by the model's own names."""
    model.zero_grad(set_to_none=True)
    for row in rows:
        model(row).loss_sum.backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def _where(subject: Subject, pieces: Sequence[Piece], worst: int, packed: Outcome, alone: Outcome) -> str:
    """In words: the first layer that differs, and whether a segment sees its neighbours."""
    piece = pieces[worst]
    name = f"segment {worst + 1} of {len(pieces)}" + (
        f", which shows {len(piece.images)} image(s)," if piece.images else ""
    )
    layer = _first_layer(subject, packed, alone, worst)
    if leaking := _leaking(subject, pieces, worst):
        return f"{name} sees segment {leaking[0] + 1}{layer}"
    return (
        f"{name} sees no neighbour, but is computed otherwise than alone{layer}: positions, windows, blocks or scales"
    )


def _first_layer(subject: Subject, packed: Outcome, alone: Outcome, worst: int) -> str:
    kinds = getattr(decoder_of(subject.reference).config, "layer_types", None) or ()
    for number, (ours, theirs) in enumerate(zip(packed.layers, alone.layers, strict=False)):
        if worst < len(ours) and worst < len(theirs) and apart(ours[worst], theirs[worst]) > BOUND:
            return f" from layer {number} on" + (f" ({kinds[number]})" if number < len(kinds) else "")
    return ""


@torch.no_grad()
def _leaking(subject: Subject, pieces: Sequence[Piece], worst: int) -> list[int]:
    """Segments whose tokens change the states of segment `worst`."""
    before = packed_states(subject, pieces)[worst]
    found = []
    for place, piece in enumerate(pieces):
        if place == worst:
            continue
        changed = replace(piece, input_ids=_others(piece))
        after = packed_states(subject, [*pieces[:place], changed, *pieces[place + 1 :]])[worst]
        if apart(after, before) > BOUND:
            found.append(place)
    return found


def _others(piece: Piece) -> torch.Tensor:
    """The segment's ids with those of text changed."""
    ids = piece.input_ids
    return torch.where(piece.is_text, (ids + 1) % piece.first_special, ids)
