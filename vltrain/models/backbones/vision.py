"""The image encoder: [cls] states of a CLIP-style ViT's residual stream, read at several depths.

Follows transformers' `CLIPVisionModel` and reuses its modules, but runs them itself: it stops at the last tap, and in
that block works for [cls] alone (of the others only keys and values are read), which saves five sixths of it. Pixels
come as uint8 and are normalised on the device, so that loaders send a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionModel

from vltrain.errors import InputError
from vltrain.models.pretrained.preprocessor import Preprocessing

VISION_NORMS = {"attention": "layer_norm1", "ffn": "layer_norm2"}


def vision_units(clip: CLIPVisionModel) -> list[tuple[str, nn.Module]]:
    """Name and module of what is loaded at once, in the order of the forward; together all parameters."""
    blocks = [(f"encoder.layers.{number}", block) for number, block in enumerate(clip.encoder.layers)]
    before = [("embeddings", clip.embeddings), ("pre_layrnorm", clip.pre_layrnorm)]
    return [*before, *blocks, ("post_layernorm", clip.post_layernorm)]


class ClipTaps(nn.Module):
    """[cls] after blocks `tap_every`, 2 `tap_every`, ...: equals `hidden_states[tap_every::tap_every][:, 0]` of the
    ViT.

    The states are raw: no final norm and no projection, as in the paper. Whether the ViT's GELU is exact or CLIP's
    quick one is the checkpoint's `hidden_act`.
    """

    def __init__(
        self,
        clip: CLIPVisionModel,
        tap_every: int,
        activation_checkpointing: bool = False,
        preprocessing: Preprocessing = Preprocessing(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        num_blocks = clip.config.num_hidden_layers
        if tap_every > num_blocks:
            raise InputError(
                f"model.vision.tap_every: found {tap_every}, expected at most the ViT's {num_blocks} blocks"
            )
        self.clip = clip
        self.tap_every = tap_every
        self.activation_checkpointing = activation_checkpointing
        self.framing = preprocessing.framing
        for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    @property
    def width(self) -> int:
        return self.clip.config.hidden_size

    @property
    def image_size(self) -> int:
        return self.clip.config.image_size

    @property
    def num_taps(self) -> int:
        """Visual tokens per image."""
        return self.clip.config.num_hidden_layers // self.tap_every

    @property
    def live_blocks(self) -> list[nn.Module]:
        """The blocks that run: up to the last tap."""
        return list(self.clip.encoder.layers[: self.num_taps * self.tap_every])

    def unused_parameters(self) -> set[nn.Parameter]:
        """Parameters that no output depends on: blocks after the last tap, and the final norm."""
        dead = [self.clip.post_layernorm, *self.clip.encoder.layers[self.num_taps * self.tap_every :]]
        return {parameter for module in dead for parameter in module.parameters()}

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> fp32, mean and deviation taken out."""
        return (pixels.float() / 255 - self.mean) / self.std

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> [N, V, d_vision]."""
        states = self.clip.pre_layrnorm(self.clip.embeddings(self.normalise(pixels)))
        taps = []
        *blocks, last = self.live_blocks
        for number, block in enumerate(blocks, start=1):
            states = self._run(block, states, None)
            if number % self.tap_every == 0:
                taps.append(states[:, 0])
        taps.append(self._run(_cls_of_block, last, states))
        return torch.stack(taps, dim=1)

    def _run(self, function: Callable[..., Tensor], *arguments: object) -> Tensor:
        if self.activation_checkpointing and self.training:
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)


def _cls_of_block(block: nn.Module, states: Tensor) -> Tensor:
    """Row 0 of what a `CLIPEncoderLayer` makes of `states` [N, P, d] -> [N, d], without computing the other rows."""
    attention = block.self_attn
    normed = block.layer_norm1(states)
    query, key, value = (
        projection(rows).unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
        for projection, rows in (
            (attention.q_proj, normed[:, :1]),
            (attention.k_proj, normed),
            (attention.v_proj, normed),
        )
    )
    dropout = attention.dropout if attention.training else 0.0  # as in the blocks before
    mixed = (
        F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=attention.scale)
        .transpose(1, 2)
        .flatten(2)
    )
    cls = states[:, :1] + attention.out_proj(mixed)
    return (cls + block.mlp(block.layer_norm2(cls)))[:, 0]
