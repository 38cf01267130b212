"""Frozen linear layers in 4 or 8 bits, by bitsandbytes: NF4 with double quantisation, and LLM.int8.

nf4   Dettmers et al. 2023 (https://arxiv.org/abs/2305.14314): blocks of 64 weights share a scale, 256 scales one of
their own; about 4.13
      bits a weight. A product is that of the dequantised weights in autocast's dtype, forward and backward.
int8  Dettmers et al. 2022 (https://arxiv.org/abs/2208.07339): one scale a row; on a GPU inputs are quantised too, row
by row, except
      for columns with an entry beyond 6, which stay 16-bit. On a CPU inputs are left as they are. Backward is that of
      the dequantised weights.

Only the linear layers of transformer blocks are quantised: not embeddings, norms and head. Gradients pass through to
what is trained around them. Trade-off: which columns count as outliers depends on all rows of a product, so on
GPUs 8-bit answers may change with what shares a batch; and no ZeRO-3, which cannot partition packed weights apart from
their scales.
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
NF4_BLOCK = 64
OLDEST = (0, 50)
INSTALL = "install it with: bash launch/setup_env.sh --with quant"


def bitsandbytes() -> ModuleType:
    """The package. Raises InputError where it is not installed, or too old."""
    try:
        # On some CPUs it warns of a kernel that it does well without, and of every cast to fp16 inside LLM.int8.
        for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
            logging.getLogger(name).setLevel(logging.ERROR)
        module = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise InputError(f"model.bits: 4 and 8 need bitsandbytes ({error}); {INSTALL}") from None
    if tuple(int(part) for part in module.__version__.split(".")[:2]) < OLDEST:
        expected = (
            f"expected {'.'.join(map(str, OLDEST))} or newer: on GPUs older ones multiply by square 4-bit matrices "
            "wrongly"
        )
        raise InputError(f"model.bits: found bitsandbytes {module.__version__}, {expected}; {INSTALL}")
    return module


class FrozenLinear(nn.Linear):
    """A linear layer of packed weights, whose numbers are a parameter without gradient and buffers.

    bitsandbytes' own layers have the same kernels and formats, but keep scales that do not follow a model to its
    device, activations that checkpointing meant to drop, and on some CPUs dequantise rows wrongly that are no multiple
    of 64 long, or pack weights anew in an evaluation for a kernel that has no backward.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.bias = linear.bias

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """[out, in]."""
        raise NotImplementedError

    def packed_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., in] -> [..., out] by the library's kernel for devices other than a CPU."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _FrozenProduct.apply(x, self)


class _FrozenProduct(torch.autograd.Function):
    """Keeps nothing between forward and backward: the input's gradient needs the weights alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        bias = None if linear.bias is None else linear.bias.to(x.dtype)
        return (
            F.linear(x, linear.dequantised(x.dtype), bias) if x.device.type == "cpu" else linear.packed_product(x, bias)
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.linear.dequantised(gradient.dtype), None


class Int8Linear(FrozenLinear):
    """int8 weights [out, in], each row with a scale: a weight is weight * scale / 127."""

    scale: Tensor  # fp32 [out]

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight, scale, _ = bitsandbytes().functional.int8_vectorwise_quant(linear.weight.detach().to(torch.float16))
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        return (self.weight * (self.scale / 127)[:, None]).to(dtype)

    def packed_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        library = bitsandbytes()
        state = library.MatmulLtState()  # which takes no arguments
        state.CB, state.SCB, state.has_fp16_weights, state.is_training = self.weight, self.scale, False, False
        state.threshold = OUTLIER_THRESHOLD
        return library.matmul(x, self.weight, bias=bias, state=state)


class Nf4Linear(FrozenLinear):
    """Two weights a byte: codes of 64 consecutive ones are times their block's scale, which is an 8-bit code times a
    scale, plus `offset`."""

    absmax: Tensor  # uint8 [blocks]
    code: Tensor  # fp32 [16]
    offset: Tensor  # fp32 scalar
    nested_absmax: Tensor  # fp32 [blocks / 256]
    nested_code: Tensor  # fp32 [256]

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight, state = bitsandbytes().functional.quantize_4bit(
            linear.weight.detach(), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        # As int8: transformers' T5 casts states to the dtype of its last matrix, whatever it is but int8.
        self.weight = nn.Parameter(weight.view(torch.int8), requires_grad=False)
        self.weight.num_packed = linear.weight.numel()
        for name, value in (
            ("absmax", state.absmax),
            ("code", state.code),
            ("offset", state.offset),
            ("nested_absmax", state.state2.absmax),
            ("nested_code", state.state2.code),
        ):
            self.register_buffer(name, value)
        self._nested_block = state.state2.blocksize

    def _state(self, shape: tuple[int, int], dtype: torch.dtype) -> Any:
        """`dtype`: what the weights are expanded to, at once and not by way of fp32."""
        state = bitsandbytes().functional.QuantState
        nested = state(
            absmax=self.nested_absmax, code=self.nested_code, blocksize=self._nested_block, dtype=torch.float32
        )
        return state(
            absmax=self.absmax,
            shape=torch.Size(shape),
            code=self.code,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=self.offset,
            state2=nested,
        )

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        # As one row: a kernel for CPUs takes rows that no whole number of blocks fills for others' scales.
        state = self._state((1, self.out_features * self.in_features), dtype)
        return (
            bitsandbytes()
            .functional.dequantize_4bit(self.weight.view(torch.uint8), state)
            .view(self.out_features, self.in_features)
        )

    def packed_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        state = self._state((self.out_features, self.in_features), x.dtype)
        return bitsandbytes().matmul_4bit(x, self.weight.view(torch.uint8), quant_state=state, bias=bias)


@torch.no_grad()
def quantise_linears(block: nn.Module, bits: int) -> None:
    """Replaces every linear layer of a transformer block that nothing is put into yet, in place; each one's old weights
    go at once.

    Args:
        bits: 4 or 8. The dtype of products is autocast's, else that of the input.
    """
    kind = {4: Nf4Linear, 8: Int8Linear}[bits]
    for name, linear in list(block.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, kind(linear))


@torch.no_grad()
def dequantise_linears(root: nn.Module) -> None:
    """Puts plain fp32 layers of exactly the same function in the place of all quantised ones under `root`."""
    for name, linear in list(root.named_modules()):
        if isinstance(linear, FrozenLinear):
            plain = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(linear.dequantised(torch.float32), requires_grad=False)
            plain.bias = linear.bias
            parent, _, leaf = name.rpartition(".")
            setattr(root.get_submodule(parent), leaf, plain)


def num_weights(parameter: Tensor) -> int:
    """How many numbers a parameter stands for: two 4-bit ones share a byte, and what ZeRO-3 has partitioned remembers
    its size."""
    return getattr(parameter, "num_packed", getattr(parameter, "ds_numel", parameter.numel()))
