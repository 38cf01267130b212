"""CLIP's ViTs and their kin: DiHT, ALIP."""

from __future__ import annotations

import re
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModel

from vltrain.models.backbones.family import Layout, Network, Tower
from vltrain.models.pretrained.clip_state import ClipStateWeights, clip_state_config, is_state_file
from vltrain.models.pretrained.preprocessor import CLIP_KINDS


def _vit(width: int, blocks: int, patch: int, image: int, *aliases: str) -> Network:
    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": blocks,
        "num_attention_heads": width // 64,
        "patch_size": patch,
        "image_size": image,
    }
    return Network(sizes, aliases)


VITS: dict[str, Network] = {
    "vit-b/32": _vit(768, 12, 32, 224, "vitb32", "vitbasepatch32", "alip"),
    "vit-b/16": _vit(768, 12, 16, 224, "vitb16", "vitbasepatch16"),
    "vit-l/14": _vit(1024, 24, 14, 224, "vitl14", "vitlargepatch14"),
    "vit-l/14-336": _vit(1024, 24, 14, 336, "vitl14336", "vitlargepatch14336"),
}


def _cls_of_block(block: Any, states: Tensor) -> Tensor:
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


CLIP = Tower(
    title="CLIP ViT",
    model_types=("clip_vision_model",),
    config=CLIPVisionConfig,
    network=CLIPVisionModel,
    published=VITS,
    layouts=(Layout(is_it=is_state_file, config=clip_state_config, weights=ClipStateWeights),),
    norms={"attention": "layer_norm1", "ffn": "layer_norm2"},
    readers={"attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "ffn": ("mlp.fc1",)},
    writers={"attention": "self_attn.out_proj", "ffn": "mlp.fc2"},
    before=("embeddings", "pre_layrnorm"),
    after=("post_layernorm",),
    has_cls=True,
    cls_of_block=_cls_of_block,
    pool=lambda clip, states: clip.post_layernorm(states[:, 0]),
    processors=CLIP_KINDS,
    whole={"clip": CLIPConfig},
    # The other half of a whole CLIP, and what leads into the space that both share.
    others=re.compile(r"text_model\.|text_projection\.|visual_projection\.weight$|logit_scale$"),
)
