"""Frozen linear layers in 4 or 8 bits, by bitsandbytes: NF4 with double quantisation, and LLM.int8.

nf4   Dettmers et al. 2023 (https://arxiv.org/abs/2305.14314): blocks of 64 weights share a scale, 256 scales one of their own; about 4.13
      bits a weight. A product is that of the dequantised weights in the compute dtype, forward and backward.
int8  Dettmers et al. 2022 (https://arxiv.org/abs/2208.07339): one scale a row; on a GPU inputs are quantised too, row by row, except
      for columns with an entry beyond 6, which stay 16-bit. On a CPU inputs are left as they are. Backward is that of the
      dequantised weights.

Only the linear layers of transformer blocks are quantised: not embeddings, norms and head. Gradients pass through to what is trained
around them. What it gives up: which columns count as outliers depends on all rows of a product, so on GPUs 8-bit answers may
change with what shares a batch; and ZeRO-3, which cannot cut up packed weights that belong to scales elsewhere.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vltrain.errors import InputError

QUANTISED_BITS = (4, 8)
OUTLIER_THRESHOLD = 6.0


def bitsandbytes() -> ModuleType:
    """The package. Raises InputError where it is not installed."""
    try:
        # On some CPUs it warns of a kernel that it does well without, and of every cast to fp16 inside LLM.int8.
        for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
            logging.getLogger(name).setLevel(logging.ERROR)
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise InputError(
            f"model.bits: 4 and 8 need bitsandbytes ({error}); install it with: bash launch/setup_env.sh --with quant"
        ) from None


class Int8Linear(nn.Linear):
    """A linear layer of int8 weights [out, in] with a scale for each row; LLM.int8's products by bitsandbytes' kernels.

    bitsandbytes' own layer keeps scales that do not follow the model to its device, and activations that checkpointing meant to drop.
    """

    scale: Tensor  # fp32 [out]; a weight is weight * scale / 127

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight, scale, _ = bitsandbytes().functional.int8_vectorwise_quant(linear.weight.detach().to(torch.float16))
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """[out, in]."""
        return (self.weight * (self.scale / 127)[:, None]).to(dtype)

    def product(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], without a graph."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if x.device.type == "cpu":
            return F.linear(x, self.dequantised(x.dtype), bias)
        library = bitsandbytes()
        state = library.MatmulLtState(CB=self.weight, SCB=self.scale, has_fp16_weights=False, is_training=False)
        state.threshold = OUTLIER_THRESHOLD
        return library.matmul(x, self.weight, bias=bias, state=state)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Int8Product.apply(x, self)


class _Int8Product(torch.autograd.Function):
    """Keeps nothing between forward and backward: the weights are frozen, so the input's gradient needs them alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Int8Linear) -> Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.linear.dequantised(gradient.dtype), None


def _nf4_linear(linear: nn.Linear, compute_dtype: torch.dtype) -> nn.Linear:
    library = bitsandbytes()
    packed = library.nn.LinearNF4(
        linear.in_features, linear.out_features, bias=False, compute_dtype=compute_dtype, compress_statistics=True, device="meta"
    )
    weight = library.nn.Params4bit(
        linear.weight.detach(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=packed
    )
    packed.weight = weight.to(linear.weight.device)  # packs it
    packed.bias = linear.bias
    # In evaluation some CPUs would have the weights packed anew, for a bf16 kernel without a backward, and left so for training.
    packed.support_avx512bf16_for_cpu = False
    return packed


@torch.no_grad()
def quantise_linears(block: nn.Module, bits: int, compute_dtype: torch.dtype) -> None:
    """Replaces every linear layer of a transformer block that nothing is put into yet, in place; each one's old weights go at once.

    Args:
        bits: 4 or 8.
        compute_dtype: of the products of 4-bit layers; 8-bit ones follow autocast.
    """
    for name, linear in list(block.named_modules()):
        if isinstance(linear, nn.Linear):
            linear.requires_grad_(False)
            parent, _, leaf = name.rpartition(".")
            packed = _nf4_linear(linear, compute_dtype) if bits == 4 else Int8Linear(linear)
            setattr(block.get_submodule(parent), leaf, packed)


@torch.no_grad()
def dequantise_linears(root: nn.Module) -> None:
    """Puts plain fp32 layers of exactly the same function in the place of all quantised ones under `root`."""
    for name, linear in list(root.named_modules()):
        weight = _dequantised(linear)
        if weight is not None:
            plain = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(weight, requires_grad=False)
            plain.bias = linear.bias
            parent, _, leaf = name.rpartition(".")
            setattr(root.get_submodule(parent), leaf, plain)


def _dequantised(module: nn.Module) -> Tensor | None:
    """The fp32 weights [out, in] of a quantised layer, None of anything else."""
    if isinstance(module, Int8Linear):
        return module.dequantised(torch.float32)
    state = getattr(getattr(module, "weight", None), "quant_state", None) if isinstance(module, nn.Linear) else None
    return None if state is None else bitsandbytes().functional.dequantize_4bit(module.weight, state).float()


def num_weights(parameter: Tensor) -> int:
    """How many numbers a parameter stands for: two 4-bit ones share a byte, and what ZeRO-3 has cut up remembers its size."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())
