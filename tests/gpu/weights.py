"""Random weights drawn where they will be used: seven billion of them take a CPU minutes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import nn

from vltrain.models.materialise import RandomWeights


class DrawnOnDevice(RandomWeights):
    """Normal matrices, norms of ones, biases of zeros, on the current CUDA device."""

    @torch.no_grad()
    def fill(self, name: str, unit: nn.Module, dtype: torch.dtype) -> None:
        for inner, parameter in list(unit.named_parameters()):
            if parameter.is_meta:
                parent, _, leaf = inner.rpartition(".")
                value = torch.empty(parameter.shape, dtype=dtype, device="cuda")
                value.normal_(std=0.02) if value.ndim > 1 else value.fill_(
                    1.0 if "norm" in inner and leaf == "weight" else 0.0
                )
                setattr(unit.get_submodule(parent), leaf, nn.Parameter(value))


def drawn_on_device() -> AbstractContextManager[Any]:
    """Within it `build_model` draws the weights of networks without a source on the CUDA device."""
    return mock.patch("vltrain.models.mmt.build.RandomWeights", DrawnOnDevice)
