"""An LLM's head, of whatever family, as one that computes losses.

What a family does to its head's outputs (a scale, a softcap) stands in the forward of its class and under a name of its
own. So it isn't read from a config but measured: the class's forward is run on numbers, with its decoder and its head
left out.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vltrain.errors import InputError
from vltrain.ops.loss import PLAIN, LogitTransform, LossHead

SMALL, LARGE = 1e-6, 1e30
"""Outputs at which a softcap does nothing, and at which it is all that is left."""
POINTS = (0.0, SMALL, LARGE, -30.0, -3.0, -0.5, 0.25, 1.0, 7.0, 60.0, 1000.0)
TOLERANCE = 1e-5


def replace_head(model: PreTrainedModel) -> LossHead:
    """Puts a `LossHead` around the weights of a model's head, in its place, and returns it.

    Raises: InputError for a head that is no linear layer, or logits that are no scale and softcap of its outputs.
    """
    head = model.get_output_embeddings()
    if isinstance(head, LossHead):
        return head
    name = type(model).__name__
    if not isinstance(head, nn.Linear):
        raise InputError(f"{name}: found a head of {type(head).__name__}, expected one linear layer")
    transform = logit_transform(model)
    taken = LossHead.take_over(head, transform)
    model.set_output_embeddings(taken)
    if model.get_output_embeddings() is not taken:
        raise InputError(f"{name}: its head cannot be replaced; expected one that `set_output_embeddings` sets")
    if transform != PLAIN:
        model.register_forward_pre_hook(_refuse_forward)
    return taken


def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """What the forward of a model's class does to its head's outputs.

    Raises: InputError if that is more than a scale and a softcap.
    """
    points = torch.tensor(POINTS, dtype=torch.float64, device="cpu")
    found = _head_less(model, points)
    at = dict(zip(points.tolist(), found.tolist(), strict=True)) if found.shape == points.shape else {}
    transform = PLAIN
    if at:
        scale, limit = at[SMALL] / SMALL, at[LARGE]
        capped = limit < LARGE * scale / 2
        transform = LogitTransform(_rounded(scale), _rounded(limit) if capped else None)
    if not at or not torch.allclose(transform(points), found.double(), rtol=TOLERANCE, atol=TOLERANCE):
        raise InputError(
            f"{type(model).__name__} makes its logits in a way that is not known here (0.25, 1 and 7 become "
            f"{', '.join(f'{at[one]:.6g}' for one in (0.25, 1.0, 7.0)) if at else 'something of another shape'}); "
            "expected a scale, a softcap, both or neither"
        )
    return transform


class _Outputs(OrderedDict[str, Any]):
    """A decoder's outputs: one, and None under every other name."""

    def __getitem__(self, key: Any) -> Any:
        return next(iter(self.values())) if key == 0 else super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)


class _Identity(nn.Identity):
    """Stands in for a head."""

    weight = torch.zeros((), dtype=torch.float64)
    bias = None


def _head_less(model: PreTrainedModel, points: Tensor) -> Tensor:
    """The logits that a model makes of its head's outputs `points` [n]: [n], where all is as it should be."""
    probe: Any = copy.copy(model)
    probe.__dict__["_modules"] = dict(model._modules)
    head = model.get_output_embeddings()
    for name, module in model._modules.items():
        if module is head:
            probe._modules[name] = _Identity()
        elif isinstance(module, PreTrainedModel):
            probe._modules[name] = _stand_in(module, points[None, None])
    with torch.no_grad(), torch.device("cpu"):
        outputs = type(model).forward(probe, input_ids=torch.zeros(1, 1, dtype=torch.int64))
    return outputs.logits.flatten()


def _stand_in(decoder: PreTrainedModel, states: Tensor) -> nn.Module:
    """A decoder with all its attributes that gives `states` for an answer, whatever it is asked."""

    def forward(*args: Any, **kwargs: Any) -> _Outputs:
        return _Outputs(last_hidden_state=states)

    stand_in = copy.copy(decoder)
    stand_in.__dict__ |= {"_forward_pre_hooks": OrderedDict(), "_forward_hooks": OrderedDict(), "forward": forward}
    return stand_in


def _rounded(value: float) -> float:
    """Without the noise of the last digits that measuring adds."""
    return float(f"{value:.7g}") if math.isfinite(value) else value


def _refuse_forward(model: nn.Module, args: Any) -> None:
    raise AssertionError(
        f"{type(model).__name__}'s forward would transform its logits twice: call its decoder, then its head"
    )
