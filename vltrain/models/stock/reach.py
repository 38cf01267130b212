"""What a forward on tensors without numbers tells of a model's tower: what it takes of an image of the size
it was made for, how many rows of it each layer computes on, and which weights have no part in what comes out: blocks
behind the layer that LLaVA reads, SigLIP's pooling head.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from vltrain.batch import ImageInputs
from vltrain.models.pretrained.quiet import quiet_transformers
from vltrain.models.stock.features import DEEP, POOLED, rows_of
from vltrain.models.stock.parts import Parts, part_of, parts_of
from vltrain.models.stock.source import network_class
from vltrain.models.without_numbers import Answers, take_numbers

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ANY_SIZE = 448  # of a picture for a tower that takes all, in pixels


@dataclass(frozen=True)
class Reach:
    """unused  names of the tower's and projector's parameters that no image's features depend on
    tensors what `get_image_features` takes of one picture, without numbers (whole numbers are there); {} where that was
            not found
    joined  the dimension along which pictures are joined, by name
    tokens  visual tokens of the picture
    rows    of the picture, that each linear layer and convolution of the core computes on, by its name
    misfits where none was found: what each kind of picture ran into
    """

    unused: frozenset[str] = frozenset()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    joined: int = 0
    tokens: int = 0
    rows: Mapping[str, int] = field(default_factory=dict)
    misfits: tuple[str, ...] = ()

    def images(self, count: int) -> ImageInputs:
        """So many pictures; floating-point numbers are on the meta device."""
        tensors = {
            name: torch.cat([one] * count, self.joined if one.is_meta else 0)
            for name, one in self.tensors.items() if count
        }  # fmt: skip
        return ImageInputs(tensors=tensors, tokens=torch.full((count,), self.tokens, dtype=torch.int64, device="cpu"))


def reach_of(config: PreTrainedConfig) -> Reach:
    """Of networks of that config."""
    key = f"{type(config).__name__} {config.to_dict()}"
    if key not in _FOUND:
        _FOUND[key] = _explore(copy.deepcopy(config))
    return _FOUND[key]


# What a family's code runs into with a picture in another family's form: one dimension more or less, or no sizes.
# Anything else is a fault.
MISFITS = (TypeError, ValueError, AttributeError, RuntimeError)
_FOUND: dict[str, Reach] = {}  # by config: a run asks several times


def _explore(config: PreTrainedConfig) -> Reach:
    without_numbers = FakeTensorMode(allow_non_fake_inputs=True)
    with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        with torch.device("meta"):
            network = network_class(config)._from_config(config)
        take_numbers(network, without_numbers, lambda parameter: torch.float32)
        parts = parts_of(network)
        known = inspect.signature(parts.core.get_image_features).parameters
        misfits: list[str] = []
        for tensors, joined in _pictures(parts):
            if not tensors.keys() <= known.keys():
                continue
            with without_numbers:
                given = {name: torch.empty(one.shape) if one.is_meta else one for name, one in tensors.items()}
            try:
                with Answers(), _counted_rows(parts.core) as rows:
                    output = parts.core.get_image_features(**given, return_dict=True)
                    features = rows_of(output[POOLED])
                    torch.stack(
                        [rows_of(layer).sum() for layer in (features, *(output.get(DEEP) or ()))]
                    ).sum().backward()
            except MISFITS as error:
                misfits.append(f"{' and '.join(tensors)}: {type(error).__name__}: {' '.join(str(error).split())[:80]}")
                continue
            unused = frozenset(
                name for name, parameter in network.named_parameters()
                if parameter.grad is None and part_of(name) != "llm"
            )  # fmt: skip
            return Reach(unused, tensors, joined, len(features), rows)
    return Reach(misfits=tuple(misfits))


@contextmanager
def _counted_rows(core: nn.Module) -> Iterator[dict[str, int]]:
    """Fills the `Reach.rows` of what runs inside."""
    rows: dict[str, int] = {}

    def counting(name: str, width: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def count(module: nn.Module, given: Any, output: Tensor) -> None:
            rows[name] = rows.get(name, 0) + output.numel() // width

        return count

    hooks = [
        module.register_forward_hook(counting(name, module.weight.shape[0]))
        for name, module in core.named_modules() if isinstance(module, LAYERS)
    ]  # fmt: skip
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def _pictures(parts: Parts) -> Iterator[tuple[dict[str, Tensor], int]]:
    """One picture as families want it, and the dimension along which they join several: alone, as tiles, with its size,
    as a list of patches with their grid."""
    config: Any = parts.tower.config
    size = getattr(config, "image_size", None) or ANY_SIZE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    picture, sizes = _meta(1, 3, height, width), torch.tensor([[height, width]])
    yield {"pixel_values": picture}, 0
    for tiles in (3, 2, 5):
        yield {"pixel_values": _meta(1, tiles, 3, height, width), "image_sizes": sizes}, 0
    yield {"pixel_values": picture, "image_sizes": sizes}, 0
    yield {"pixel_values": picture[None]}, 1
    patch, merged = getattr(config, "patch_size", None), getattr(config, "spatial_merge_size", 1)
    if isinstance(patch, int):
        rows, columns = (max(1, edge // patch // merged) * merged for edge in (height, width))
        numbers = 3 * getattr(config, "temporal_patch_size", 1) * patch**2
        grid = torch.tensor([[1, rows, columns]])
        yield {"pixel_values": _meta(rows * columns, numbers), "image_grid_thw": grid}, 0


def _meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")
