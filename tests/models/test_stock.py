"""Vision-language models of transformers, packed: losses and gradients are those of transformers' own forward on each
sample alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.stock import CONFIGS, IMAGE, Piece, row_of, tiny
from vltrain.batch import Batch
from vltrain.config.model.mmt import AdapterConfig
from vltrain.models.build import build_model
from vltrain.models.stock.model import StockModel
from vltrain.models.stock.source import network_class

PIECES = (Piece((1,), 3, 9), Piece((), 2, 6), Piece((0, 1), 5, 4), Piece((1,), 1, 3))
NO_ADAPTERS = AdapterConfig(vision="none", llm="none")


def shaken(model: nn.Module, seed: int = 3) -> None:
    """Moves every parameter, so that nothing is zero or one by its initialisation."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))


def stock(name: str, **changes: Any) -> StockModel:
    model = build_model(tiny(name, **changes))
    assert isinstance(model, StockModel)
    shaken(model)
    return model


def plain_of(model: StockModel) -> Any:
    """transformers' own model with the same weights, its attention in plain operations."""
    plain = network_class(model.config)(copy.deepcopy(model.config))
    plain.set_attn_implementation("eager")
    plain.load_state_dict({name.removeprefix("network."): one for name, one in model.state_dict().items()})
    return plain


def alone(name: str, plain: Any, row: Batch) -> torch.Tensor:
    """Summed loss of one sample by transformers' whole forward, images included."""
    shown = (row.input_ids == IMAGE).long()[None]
    kinds = {"mm_token_type_ids": shown} if name.startswith("qwen") else {}
    kinds |= {"token_type_ids": shown} if name == "gemma3" else {}
    kinds |= {"token_type_ids": (row.blocks < 0).long()[None]} if name.startswith("paligemma") else {}
    logits = plain(input_ids=row.input_ids[None], use_cache=False, **row.pixels.tensors, **kinds).logits[0]
    return F.cross_entropy(logits, row.labels, reduction="sum")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_rows_losses_and_gradients_are_those_of_each_sample_alone(name: str) -> None:
    model = stock(name, tune="full", adapter=NO_ADAPTERS)
    plain = plain_of(model)
    row = row_of(name, model.parts.core, PIECES)
    found = model(row)
    found.loss_sum.backward()
    pieces = [row_of(name, model.parts.core, [piece], seed=place) for place, piece in enumerate(PIECES)]
    expected = torch.stack([alone(name, plain, piece) for piece in pieces])
    expected.sum().backward()
    torch.testing.assert_close(found.segment_losses, expected.detach(), rtol=1e-6, atol=1e-5)
    for (ours, gradient), (theirs, due) in zip(model.network.named_parameters(), plain.named_parameters(), strict=True):
        assert ours == theirs
        if due.grad is None:
            assert gradient.grad is None or not gradient.grad.any(), f"{ours}: transformers never reaches it"
        else:
            torch.testing.assert_close(
                gradient.grad, due.grad, rtol=1e-4, atol=2e-4, msg=lambda text: f"{ours}: {text}"
            )
