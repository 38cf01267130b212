"""DINOv2, with and without registers, and DINOv3's ViTs. Their positions fit squares of any size: DINOv2's are
interpolated, DINOv3's are rotary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from vltrain.models.backbones.family import Network, Tower

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def _vit(width: int, blocks: int, heads: int, patch: int, image: int, *aliases: str, **more: Any) -> Network:
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": image,
        **more,
    }
    return Network(sizes, aliases)


def _no_swiglu(config: Any) -> str | None:
    return "use_swiglu_ffn: found true, whose weights lie in files in another layout" if config.use_swiglu_ffn else None


def _rotary(network: Any, pixels: Tensor) -> tuple[Any, ...]:
    # In training mode it moves and scales coordinates at random, which is an augmentation of DINOv3's own training.
    return (network.rope_embeddings.eval()(pixels.to(network.embeddings.patch_embeddings.weight.dtype)),)


DINOV2 = Tower(
    title="DINOv2",
    model_types=("dinov2",),
    config=Dinov2Config,
    network=Dinov2Model,
    published={
        "dinov2-s/14": _vit(384, 12, 6, 14, 518, "dinov2small"),
        "dinov2-b/14": _vit(768, 12, 12, 14, 518, "dinov2base"),
        "dinov2-l/14": _vit(1024, 24, 16, 14, 518, "dinov2large"),
    },
    since="5.24",
    lacks=_no_swiglu,
    norms={"attention": "norm1", "ffn": "norm2"},
    sublayers={"attention": "attention", "ffn": "mlp"},
    readers={"attention": ("attention.q_proj", "attention.k_proj", "attention.v_proj"), "ffn": ("mlp.fc1",)},
    writers={"attention": "attention.o_proj", "ffn": "mlp.fc2"},
    bias_switches={"attention": ("qkv_bias",)},
    layers="encoder.layer",
    before=("embeddings",),
    after=("layernorm",),
    patch="embeddings.patch_embeddings.projection",
    idle=("embeddings.mask_token",),
    has_cls=True,
    pool=lambda dino, states: dino.layernorm(states[:, 0]),
    any_size=True,
    processors=("BitImageProcessor",),
    mean=_MEAN,
    std=_STD,
    renamed=(
        (r"\.attention\.attention\.query\.", ".attention.q_proj."),
        (r"\.attention\.attention\.key\.", ".attention.k_proj."),
        (r"\.attention\.attention\.value\.", ".attention.v_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    ),
)
DINOV2_WITH_REGISTERS = replace(
    DINOV2,
    title="DINOv2 with registers",
    model_types=("dinov2_with_registers",),
    config=Dinov2WithRegistersConfig,
    network=Dinov2WithRegistersModel,
    published={},
    registers=lambda config: config.num_register_tokens,
)
DINOV3 = Tower(
    title="DINOv3 ViT",
    model_types=("dinov3_vit",),
    config=DINOv3ViTConfig,
    network=DINOv3ViTModel,
    published={
        "dinov3-s/16": _vit(384, 12, 6, 16, 224, "dinov3vits16", num_register_tokens=4, intermediate_size=1536),
        "dinov3-b/16": _vit(768, 12, 12, 16, 224, "dinov3vitb16", num_register_tokens=4, intermediate_size=3072),
        "dinov3-l/16": _vit(1024, 24, 16, 16, 224, "dinov3vitl16", num_register_tokens=4, intermediate_size=4096),
    },
    norms={"attention": "norm1", "ffn": "norm2"},
    sublayers={"attention": "attention", "ffn": "mlp"},
    readers={
        "attention": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "ffn": ("mlp.gate_proj", "mlp.up_proj"),  # the first in gated ones only
    },
    writers={"attention": "attention.o_proj", "ffn": "mlp.down_proj"},
    bias_switches={"attention": ("query_bias", "key_bias", "value_bias", "proj_bias"), "ffn": ("mlp_bias",)},
    layers="model.layer",
    before=("embeddings",),
    after=("norm",),
    patch="embeddings.patch_embeddings",
    idle=("embeddings.mask_token",),
    has_cls=True,
    registers=lambda config: config.num_register_tokens,
    beside=_rotary,
    pool=lambda dino, states: dino.norm(states[:, 0]),
    any_size=True,
    processors=("DINOv3ViTImageProcessor",),
    mean=_MEAN,
    std=_STD,
    renamed=((r"^layer\.", "model.layer."),),
)
