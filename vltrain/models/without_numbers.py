"""Runs of a model on torch's fake tensors, which have shapes and no numbers.

What a model asks of numbers that are not there is answered: no number equals another, and all other comparisons hold.
So SmolVLM, which drops tiles of zeros, keeps all. A mask of booleans then has numbers, and chooses so many rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten: Any = torch.ops.aten
_COMPARISONS = {_aten.eq, _aten.ne, _aten.lt, _aten.le, _aten.gt, _aten.ge}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._unsafe_index.Tensor}


def take_numbers(
    model: nn.Module, mode: FakeTensorMode, frozen_dtype: Callable[[nn.Parameter], torch.dtype]
) -> list[nn.Parameter]:
    """Puts fake parameters and buffers in the place of an outline's, in place; what was shared stays shared. Trained
    parameters are fp32, frozen ones of `frozen_dtype`."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    with mode:
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                if parameter not in made:
                    dtype = torch.float32 if parameter.requires_grad else frozen_dtype(parameter)
                    made[parameter] = nn.Parameter(
                        torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad
                    )
                module._parameters[name] = made[parameter]
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return list(made.values())


class Answers(TorchDispatchMode):
    """A context for such a run; to be entered before whatever counts its tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _INDEXED:
            indices = [one for index in args[1] for one in _places(index)]
            args = (args[0], indices, *args[2:])
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _COMPARISONS and isinstance(result, FakeTensor):
            return torch.full(result.shape, func.overloadpacket is not _aten.eq)
        return result


def _places(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """The places that an index means: of a mask, a tensor a dimension."""
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
        return (index,)
    return index.nonzero(as_tuple=True)
