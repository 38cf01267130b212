"""SigLIP and SigLIP 2. Checkpoints of SigLIP 2 for squares of one size are of the type `siglip`; those for any aspect
ratio (NaFlex) of `siglip2`, and read here the square of as many patches as they have positions."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Siglip2Config,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vltrain.models.backbones.clip import CLIP
from vltrain.models.backbones.family import Network, Tower

_HALF = (0.5, 0.5, 0.5)
# The other half of a whole SigLIP.
_TEXT = re.compile(r"text_model\.|logit_scale$|logit_bias$")


def _vit(width: int, ffn: int, blocks: int, heads: int, patch: int, image: int, *aliases: str) -> Network:
    sizes = {
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": image,
    }
    return Network(sizes, aliases)


def _patch_rows(network: Any, pixels: Tensor) -> Tensor:
    """SigLIP 2 reads patches as rows of pixels, channels last, and their numbers down and across."""
    size = network.config.patch_size
    grid = pixels.shape[-1] // size
    rows = pixels.unflatten(3, (grid, size)).unflatten(2, (grid, size)).permute(0, 2, 4, 3, 5, 1)
    shapes = torch.full((len(pixels), 2), grid, device=pixels.device)
    return network.embeddings(rows.flatten(3).flatten(1, 2), shapes)


SIGLIP = Tower(
    title="SigLIP ViT",
    model_types=("siglip_vision_model",),
    config=SiglipVisionConfig,
    network=SiglipVisionModel,
    published={
        "siglip-b/16": _vit(768, 3072, 12, 12, 16, 224, "siglipbasepatch16224", "siglip2basepatch16224"),
        "siglip-l/16-384": _vit(1024, 4096, 24, 16, 16, 384, "sigliplargepatch16384", "siglip2largepatch16384"),
        "siglip-so400m/14-384": _vit(1152, 4304, 27, 16, 14, 384, "siglipso400mpatch14384", "siglip2so400mpatch14384"),
    },
    norms=CLIP.norms,
    readers=CLIP.readers,
    writers=CLIP.writers,
    before=("embeddings",),
    after=("post_layernorm", "head"),
    has_cls=False,
    pool=lambda siglip, states: siglip.head(siglip.post_layernorm(states)),
    processors=("SiglipImageProcessor",),
    mean=_HALF,
    std=_HALF,
    whole={"siglip": SiglipConfig},
    others=_TEXT,
)
SIGLIP2 = Tower(
    title="SigLIP 2 NaFlex ViT",
    model_types=("siglip2_vision_model",),
    config=Siglip2VisionConfig,
    network=Siglip2VisionModel,
    norms=CLIP.norms,
    readers=CLIP.readers,
    writers=CLIP.writers,
    before=("embeddings",),
    after=("post_layernorm", "head"),
    has_cls=False,
    embed=_patch_rows,
    pool=lambda siglip, states: siglip.head(siglip.post_layernorm(states)),
    image_size=lambda config: config.patch_size * math.isqrt(config.num_patches),
    processors=("Siglip2ImageProcessor",),
    mean=_HALF,
    std=_HALF,
    whole={"siglip2": Siglip2Config},
    others=_TEXT,
)
