"""What a model's weights take up: by part, trained or frozen, and in how many bits.

Quantised are the frozen linear layers of transformer blocks, nothing else (bitsandbytes' formats):

4 bits   NF4 with double quantisation: two weights a byte; per 64 weights an 8-bit scale; per 256 scales an fp32 one.
Each layer keeps two
         code books (16 and 256 fp32 numbers) and an offset. 4.127 bits a weight.
8 bits   LLM.int8: a byte a weight and an fp32 scale a row.
"""

from __future__ import annotations

import torch
from torch import nn

from vltrain.errors import InputError
from vltrain.memory.zero import Parameter
from vltrain.models.interface import VisionLanguageModel

NF4_BLOCK, NF4_SCALES_BLOCK, NF4_CODES = 64, 256, 16 + 256 + 1


def quantised_bytes(weight: torch.Tensor, bits: int) -> int:
    """Bytes of a linear layer's weight [out, in] in 4 or 8 bits, scales included."""
    num_weights = weight.numel()
    if bits == 8:
        return num_weights + 4 * len(weight)
    num_scales = -(-num_weights // NF4_BLOCK)
    return -(-num_weights // 2) + num_scales + 4 * -(-num_scales // NF4_SCALES_BLOCK) + 4 * NF4_CODES


class WeightPlan:
    """How each parameter of a model's outline is kept.

    Args:
        model: on the meta device.
        bits: 4, 8, 16, 32, or None for `dtype`: of frozen weights.
        dtype: of matrix products.

    Raises: InputError for 4 or 8 bits where no linear layer is frozen.
    """

    def __init__(self, model: VisionLanguageModel, bits: int | None, dtype: torch.dtype) -> None:
        self.bits, self.dtype = bits, dtype
        self.frozen_dtype = {16: torch.bfloat16, 32: torch.float32}.get(bits, dtype)
        self.frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        linears = (module for block in model.blocks for module in block.modules() if isinstance(module, nn.Linear))
        self._quantised = (
            {linear.weight for linear in linears if not linear.weight.requires_grad} if bits in (4, 8) else set()
        )
        if bits in (4, 8) and not self._quantised:
            raise InputError(
                f"model.bits: found {bits}, but only frozen weights can be quantised and all are tuned; leave "
                "the bits out"
            )

    def num_bytes(self, parameter: nn.Parameter) -> int:
        """What it takes up where it is whole."""
        if parameter in self._quantised:
            return quantised_bytes(parameter, self.bits)
        return parameter.numel() * (4 if parameter.requires_grad else self.frozen_dtype.itemsize)

    def computed_dtype(self, parameter: nn.Parameter) -> torch.dtype:
        """A frozen parameter's dtype as autocast meets it: packed weights are unpacked to that of products."""
        return self.dtype if parameter in self._quantised else self.frozen_dtype

    @property
    def unpacked_bytes(self) -> int:
        """The largest packed weight, unpacked for a product; 0 where none is packed."""
        return max((weight.numel() * self.dtype.itemsize for weight in self._quantised), default=0)

    def frozen_by_kind(self) -> dict[str, list[Parameter]]:
        """The frozen parameters by how they are kept: {"4-bit": [...], "bf16": [...]}."""
        plain = {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.frozen_dtype]
        result: dict[str, list[Parameter]] = {}
        for parameter in self.frozen:
            kind = f"{self.bits}-bit" if parameter in self._quantised else plain
            result.setdefault(kind, []).append(self.as_kept(parameter))
        return result

    def as_kept(self, parameter: nn.Parameter) -> Parameter:
        return Parameter(parameter.numel(), self.num_bytes(parameter))
