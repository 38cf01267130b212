"""The image encoder: [cls] states of a CLIP-style ViT's residual stream, read at several depths.

Follows transformers' `CLIPVisionModel` and reuses its blocks, but runs them itself: it stops at the last tap, keeps only the
[cls] rows of the others, and normalises uint8 pixels on the device they are needed on, so that loaders send a
quarter of the bytes. Blocks after the last tap and the final norm never run.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vltrain.errors import InputError

VISION_NORMS = {"attention": "layer_norm1", "ffn": "layer_norm2"}


class ClipTaps(nn.Module):
    """[cls] after blocks `tap_every`, 2 `tap_every`, ...: equals `hidden_states[tap_every::tap_every][:, 0]` of the ViT.

    The states are raw: no final norm and no projection, as in the paper. Whether the ViT's GELU is exact or CLIP's
    quick one is the checkpoint's `hidden_act`.
    """

    def __init__(self, clip: CLIPVisionModel, tap_every: int, activation_checkpointing: bool = False) -> None:
        super().__init__()
        num_blocks = clip.config.num_hidden_layers
        if tap_every > num_blocks:
            raise InputError(f"model.vision.tap_every: found {tap_every}, expected at most the ViT's {num_blocks} blocks")
        self.clip = clip
        self.tap_every = tap_every
        self.activation_checkpointing = activation_checkpointing
        for name, values in (("mean", OPENAI_CLIP_MEAN), ("std", OPENAI_CLIP_STD)):
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
        """uint8 [N, 3, H, W] -> fp32, CLIP's mean and deviation taken out."""
        return (pixels.float() / 255 - self.mean) / self.std

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> [N, V, d_vision]."""
        states = self.clip.pre_layrnorm(self.clip.embeddings(self.normalise(pixels)))
        taps = []
        for number, block in enumerate(self.live_blocks, start=1):
            states = self._run(block, states)
            if number % self.tap_every == 0:
                taps.append(states[:, 0])
        return torch.stack(taps, dim=1)

    def _run(self, block: nn.Module, states: Tensor) -> Tensor:
        if self.activation_checkpointing and self.training:
            return checkpoint(block, states, None, use_reentrant=False)
        return block(states, None)
