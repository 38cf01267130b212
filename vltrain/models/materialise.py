"""Networks that get their weights unit by unit: built without memory, each unit (embeddings, one block, head) then made
and written.

A unit that has its weights can be packed into fewer bits or cut up among ranks before the next one is made, so a load
holds what becomes of the network and one unit more, whatever the layout and dtype of the files. Trade-off: files
are opened once for every unit, so that what was read for the last one leaves memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from vltrain.models.random import seeded

Model = TypeVar("Model", bound=PreTrainedModel)
Write = Callable[[str, Tensor], None]
"""Copies the weight of that name, as transformers names it, into the tensor, whatever its dtype."""


class Weights(Protocol):
    """Where a network's weights come from. Making one checks names and shapes, as far as files tell without being read.

    files: everything that is read for them, sizes included, by its name in the source; a single file is called `file`,
    whatever it is called.
    """

    files: dict[str, Path]

    def fill(self, name: str, unit: nn.Module, dtype: torch.dtype) -> None:
        """Gives every parameter of a unit that is still on the meta device memory on the CPU, and its value in `dtype`.

        Args:
            name: the unit's in its network, "" for the network itself; the unit is still as transformers made it.
        """
        ...


def empty_model(model_class: type[Model], config: PreTrainedConfig, attention: str | dict[str, str]) -> Model:
    """The network with every parameter on the meta device. Its buffers (rotary frequencies, position ids) are real.

    Args:
        attention: transformers' name of it; of a network of several, by the name of each one's config.
    """
    with (
        init_empty_weights(include_buffers=False),
        torch.random.fork_rng(devices=[]),
    ):  # constructors draw what is thrown away here
        return model_class._from_config(config, attn_implementation=attention).eval()


@torch.no_grad()
def fill_by_name(name: str, unit: nn.Module, dtype: torch.dtype, write: Write) -> None:
    """`Weights.fill` where each weight is written by itself."""
    for inner, parameter in list(unit.named_parameters()):
        if parameter.is_meta:
            write(f"{name}.{inner}" if name else inner, materialise(unit, inner, dtype))


def materialise(module: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    """Gives parameter `name` memory on the CPU and returns it for writing; what it holds is undefined until then."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    written = torch.empty(getattr(owner, leaf).shape, dtype=dtype, device="cpu")
    setattr(owner, leaf, nn.Parameter(written))
    return written


class RandomWeights:
    """transformers' own initialisation, each unit's numbers drawn by themselves: whoever draws them, alone or after
    others."""

    def __init__(self, network: PreTrainedModel, seed: int, part: str) -> None:
        self.network, self.seed, self.part = network, seed, part
        self.files: dict[str, Path] = {}

    @torch.no_grad()
    def fill(self, name: str, unit: nn.Module, dtype: torch.dtype) -> None:
        made = [inner for inner, parameter in unit.named_parameters() if parameter.is_meta]
        for inner in made:
            materialise(unit, inner, torch.float32)
        if made:  # else a head that shares the embeddings' weight
            with seeded(self.seed, f"{self.part}/{name}"):
                unit.apply(self.network._init_weights)
        for inner in made:
            parameter = unit.get_parameter(inner)
            parameter.data = parameter.data.to(dtype)


def assert_materialised(model: nn.Module) -> None:
    """Every parameter has been given memory: a loader that forgets one is wrong, not its input."""
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, f"parameters without weights: {left}"
