"""A forward as on CUDA without a GPU: torch's CUDA build, and tensors without memory that say they are on `cuda` and
obey CUDA's own autocast.

Host bookkeeping (lengths of segments, and what is counted from them) goes on with real tensors. torch's attention is
not run but counted, in the dtype that autocast gives its inputs: which kernel it takes it asks the driver, without
which it would take plain products in fp32. Forward only: autograd's engine asks the driver for a context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tests.support.precision import Products
from vltrain.batch import Batch
from vltrain.models.interface import VisionLanguageModel


class _WithoutDriver(TorchFunctionMode):
    """Runs on real tensors what is given none but real ones and makes nothing on CUDA; counts attention."""

    def __init__(self, products: Products) -> None:
        super().__init__()
        self._products = products

    def _attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        if torch.is_autocast_enabled("cuda"):
            query, key, value = (one.to(torch.get_autocast_dtype("cuda")) for one in (query, key, value))
        if len({one.dtype for one in (query, key, value)}) > 1 or {one.device.type for one in (query, key, value)} != {
            "cuda"
        }:
            self._products.mixed.append(
                f"attention: {[(tuple(one.shape), one.dtype, one.device) for one in (query, key, value)]}"
            )
        self._products.by_dtype[query.dtype] += (
            query.numel() * key.shape[-2] + query[..., :1].numel() * key.shape[-2] * value.shape[-1]
        )
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, FakeTensor) for leaf in leaves):
            return func(*args, **kwargs)
        to_cuda = any(
            isinstance(leaf, torch.device) and leaf.type == "cuda" or leaf == "cuda"
            for leaf in leaves
            if not isinstance(leaf, torch.Tensor)
        )
        if func is torch.Tensor.pin_memory:
            return args[0]
        if to_cuda and func is torch.Tensor.to:
            return torch.empty(args[0].shape, dtype=args[0].dtype, device="cuda")
        if to_cuda:
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


@contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """torch.autocast("cuda", dtype), which would look for a driver."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def products_of_forward(model: VisionLanguageModel, batch: Batch) -> Products:
    """The products of a training forward in bf16. The model's tensors are replaced by ones without memory."""
    mode, products = FakeTensorMode(allow_non_fake_inputs=True), Products()

    def on_cuda(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

    made: dict[torch.Tensor, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = torch.nn.Parameter(on_cuda(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = on_cuda(buffer)
    moved = dataclasses.replace(batch, **{name: on_cuda(getattr(batch, name)) for name in Batch._MOVED})
    with mode, products, _WithoutDriver(products), cuda_autocast(torch.bfloat16):
        loss = model.train()(moved).loss_sum
    assert loss.device.type == "cuda" and loss.dtype == torch.float32
    return products
