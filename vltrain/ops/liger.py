"""Liger's Triton kernels in a LLaMA: RMSNorm, rotary embedding and SwiGLU. The one place that chooses and installs
them.

They save memory traffic: what plain operations write and read several times goes through a kernel once. Norms that an
adapter's kernel takes in (`vltrain.ops.fused`) never call theirs. Only the instances at hand are changed, except for
transformers' one function of the rotary embedding, which is given a dispatcher: layers of other models go on to the
original.

Liger's fused head and loss is left out: for a loss per token, which faulty samples are found by, it makes all logits
twice; `vltrain.ops.loss` makes them once.
"""

from __future__ import annotations

import importlib.util
import logging
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from vltrain.errors import InputError
from vltrain.ops.fused import interpreted

logger = logging.getLogger(__name__)

Kernels = Literal["liger", "torch"]
_plain_rotary = modeling_llama.apply_rotary_pos_emb


def choose_kernels(
    requested: str,
    device: torch.device | str,
    activation: str,
    key: str = "model.llm.kernels",
    *,
    lacking: str | None = None,
    log: bool = True,
) -> Kernels:
    """Settles `auto` of the setting `key` and returns `liger` or `torch`, logging (`log`) the choice.

    Args:
        device: of the forwards; an outline on the meta device has none and stays plain, whatever is asked for.
        activation: the LLM's `hidden_act`.
        lacking: why there are none for this LLM, whatever the device; None: there are.

    Raises: InputError if `liger` is asked for where it cannot run.
    """
    if torch.device(device).type == "meta":
        return "torch"
    missing = lacking or _what_is_missing(torch.device(device).type == "cuda", activation)
    if requested == "liger" and missing:
        raise InputError(f"{key}: found 'liger', but {missing}; take auto or torch")
    chosen = "torch" if requested == "torch" or missing or (requested == "auto" and interpreted()) else "liger"
    if log:
        logger.info(
            "norms, rotary embedding and SwiGLU of the LLM: %s%s",
            chosen,
            f" ({missing})" if requested == "auto" and missing else "",
        )
    return chosen


def _what_is_missing(on_cuda: bool, activation: str) -> str | None:
    if not on_cuda and not interpreted():
        return "the model runs on no CUDA device"
    if importlib.util.find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed: pip install 'vltrain[gpu]'"
    return None if activation in ("silu", "swish") else f"this LLM's activation is '{activation}', and it knows silu"


def install_liger(llm: nn.Module) -> None:
    """Gives norms, rotary embedding and MLPs of this LLM Liger's kernels, in place; its modules and parameters stay
    what they are."""
    for module in llm.modules():
        if isinstance(module, modeling_llama.LlamaRMSNorm):
            module.forward = MethodType(_rms_norm, module)
        elif isinstance(module, modeling_llama.LlamaMLP):
            module.forward = MethodType(_swiglu, module)
        elif isinstance(module, modeling_llama.LlamaAttention):
            module.forward = MethodType(_attention, module)
    modeling_llama.apply_rotary_pos_emb = _rotary


# Where torch.compile traces a block, the three are plain operations, which it fuses itself: it cannot trace Liger's.


def _rms_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return type(self).forward(self, hidden_states)
    from liger_kernel.ops import LigerRMSNormFunction

    # Not in place: the gradient that arrives may be held by an adapter's skip connection as well.
    return LigerRMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False, None)


def _swiglu(self: nn.Module, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return type(self).forward(self, x)
    from liger_kernel.ops import LigerSiLUMulFunction

    return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))


def _attention(
    self: nn.Module, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **options: Any
) -> Any:
    """The layer's own forward, with a note on the cosines that tells `_rotary` whose they are.

    Made here, in each layer and again in each recomputation: hooks on modules, ZeRO-3's among them, replace the tensors
    that pass through.
    """
    if torch.compiler.is_compiling():
        return type(self).forward(self, hidden_states, position_embeddings, **options)
    position_embeddings[0].by_liger = True
    return type(self).forward(self, hidden_states, position_embeddings, **options)


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling() or not getattr(cos, "by_liger", False):
        return _plain_rotary(q, k, cos, sin, unsqueeze_dim)
    from liger_kernel.ops import LigerRopeFunction

    return LigerRopeFunction.apply(q, k, cos, sin, None, unsqueeze_dim)
