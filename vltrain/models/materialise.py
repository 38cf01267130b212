"""Networks that get their weights one by one: built without memory, each parameter then made in its final dtype and written.

So a load never holds two copies of a network, whatever the layout and dtype of its files.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

Model = TypeVar("Model", bound=PreTrainedModel)


def empty_model(model_class: type[Model], config: PreTrainedConfig, attention: str) -> Model:
    """The network with every parameter on the meta device. Its buffers (rotary frequencies, position ids) are real."""
    with init_empty_weights(include_buffers=False):
        return model_class._from_config(config, attn_implementation=attention).eval()


def materialise(model: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    """Gives parameter `name` memory on the CPU and returns it for writing; what it holds is undefined until then."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    written = torch.empty(getattr(module, leaf).shape, dtype=dtype, device="cpu")
    setattr(module, leaf, nn.Parameter(written))
    return written


def assert_materialised(model: nn.Module) -> None:
    """Every parameter has been given memory: a loader that forgets one is wrong, not its input."""
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, f"parameters without weights: {left}"
