"""How much arithmetic an InstructBLIP's training step needs: `vltrain.models.flops` for ViT, Q-Former and T5.

Counted as there: matrix products of forward, of trained weights' gradients, and of states that something trained lies
before. An image counts with one look of the Q-Former at it; the prompt's own rows in the Q-Former are left out (a tenth
of its work at 32 queries).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from vltrain.models.flops import Flops, linear_flops, llm_flops
from vltrain.models.peft.lora import outer_linears


def count_flops(model: Any) -> Flops:
    """The `Flops` of an `InstructBlip`, given which of its parameters are trained now."""
    per_image, visual_need_grad = _image_flops(model)
    if not model.is_encoder_decoder:
        per_token, per_causal_pair, per_label = llm_flops(model.llm, visual_need_grad)
        half = per_causal_pair / 2
        return Flops(per_token=per_token + half, per_pair=half, per_image=per_image, per_label=per_label)
    encoder, width, encoded_need_grad = _rows(model.llm.encoder, visual_need_grad)
    decoder, _, _ = _rows(model.llm.decoder, encoded_need_grad)
    head = linear_flops(model.llm.lm_head, needs_grad=True)
    return Flops(
        per_token=encoder, per_pair=_pair(width, encoded_need_grad), per_image=per_image, per_label=decoder + head
    )


def _image_flops(model: Any) -> tuple[float, bool]:
    """(operations per image in ViT, Q-Former and projection, do the visual tokens need a gradient?)"""
    num_rows = model.vision.embeddings.num_positions
    total, grad = vision_flops(model)
    grad = grad or _trained(model.vision.post_layernorm)
    queries = model.visual_tokens
    looked_at_grad, grad = grad, grad or _trained(model.queries)
    for layer in model.qformer.encoder.layer:
        for name, linear in outer_linears(layer):
            if name.startswith(("intermediate.", "output.")):
                continue  # those two are the text's
            looks = name.startswith("crossattention.attention.") and name.rpartition(".")[2] in ("key", "value")
            total += (num_rows if looks else queries) * linear_flops(
                linear, needs_grad=looked_at_grad if looks else grad
            )
            grad = grad or _trained(linear)
        total += (
            queries
            * (queries + num_rows * hasattr(layer, "crossattention"))
            * _pair(model.config.qformer_config.hidden_size, grad)
        )
    total += queries * linear_flops(model.projection, needs_grad=grad)
    return total, grad or _trained(model.projection)


def vision_flops(model: Any) -> tuple[float, bool]:
    """(operations per image in the ViT, do its states need a gradient?)"""
    vision, sizes = model.vision, model.config.vision_config
    num_rows = vision.embeddings.num_positions
    per_row, width, grad = _rows(vision.encoder, _trained(vision.embeddings))
    patches = 2.0 * (num_rows - 1) * sizes.hidden_size * 3 * sizes.patch_size**2
    return num_rows * (per_row + num_rows * _pair(width, grad)) + patches, grad


def _rows(stack: nn.Module, grad: bool) -> tuple[float, int, bool]:
    """(operations per row in a stack's linear layers, width of its attention, do the states that leave need a
    gradient?)"""
    total, width = 0.0, 0
    for name, linear in outer_linears(stack):
        total += linear_flops(linear, needs_grad=grad)
        grad = grad or _trained(linear)
        width += linear.in_features * name.endswith((".o", "self_attn.projection"))
    return total, width, grad


def _pair(width: int, grad: bool) -> float:
    """Scores and their use, of all layers whose attention has `width` numbers together; backward, two products for each
    of those."""
    return 4.0 * width * (3 if grad else 1)


def _trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
