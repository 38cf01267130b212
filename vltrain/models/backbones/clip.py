"""CLIP's ViTs and their kin."""

from __future__ import annotations

from vltrain.models.interface import Network


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
