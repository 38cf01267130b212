"""Small pictures for a small config: a few patches a side, and the ratio of patches to visual tokens as it was."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vltrain.audit.small.depth import LEAST, layers_of

SIDE_TOKENS = 2  # visual tokens a side, where patches are pooled to them


@dataclass(frozen=True, kw_only=True)
class FeatureLayers:
    """Which hidden states of the tower are features: `new` for the config, and how many layers it takes."""

    depth: int
    new: dict[str, Any]


def feature_layers(values: dict[str, Any]) -> FeatureLayers | None:
    """`vision_feature_layer`, one or several, for a shallow tower: how near they are to its end, and to each other, at
    most 1 layer apart."""
    given, vision = values.get("vision_feature_layer"), values.get("vision_config")
    depth = layers_of(vision) if isinstance(vision, dict) else None
    if given is None or depth is None:
        return None
    many = given if isinstance(given, list) else [given]
    absolute = {one: one if one >= 0 else depth + 1 + one for one in many}
    back, gone, before = {}, 0, depth
    for place in sorted(set(absolute.values()), reverse=True):
        gone += min(before - place, 1)
        back[place], before = gone, place
    small = max(LEAST, gone + 1)
    new = [small - back[absolute[one]] - (0 if one >= 0 else small + 1) for one in many]
    return FeatureLayers(depth=small, new={"vision_feature_layer": new if isinstance(given, list) else new[0]})


def shrink_pictures(values: dict[str, Any]) -> None:
    """Image sizes of a whole config, in place."""
    vision = values.get("vision_config")
    if not isinstance(vision, dict):
        return
    patch = _one(vision.get("patch_size"))
    size = _one(vision.get("image_size"))
    if patch and size and size > patch:
        pool = _pool(values, vision, size // patch)
        patches = max(4, SIDE_TOKENS * pool)
        small = patches * patch
        vision["image_size"] = [small, small] if isinstance(vision["image_size"], list) else small
        tokens = (patches // pool) ** 2
        for level in (values, vision, values.get("text_config") or {}):
            for name in ("mm_tokens_per_image", "image_seq_length", "num_image_tokens", "image_seq_len"):
                if isinstance(level.get(name), int):
                    level[name] = tokens
        if isinstance(values.get("image_grid_pinpoints"), list):
            values["image_grid_pinpoints"] = [[small, 2 * small], [2 * small, small], [2 * small, 2 * small]]
    if isinstance(vision.get("num_patches"), int):
        vision["num_patches"] = 16
    if isinstance(vision.get("num_position_embeddings"), int):
        vision["num_position_embeddings"] = 16
    if patch and isinstance(vision.get("window_size"), int):
        merged = patch * (vision.get("spatial_merge_size") or 1)
        vision["window_size"] = merged * min(2, max(1, vision["window_size"] // merged))


def _pool(values: dict[str, Any], vision: dict[str, Any], patches: int) -> int:
    """How many patches a side become one visual token."""
    if isinstance(values.get("mm_tokens_per_image"), int):
        return max(1, patches // math.isqrt(values["mm_tokens_per_image"]))
    for level in (values, vision):
        for name in ("scale_factor", "spatial_merge_size", "downsample_factor", "projector_pooling_ratio"):
            if isinstance(level.get(name), int):
                return level[name]
        for name in ("downsample_ratio", "pixel_shuffle_ratio"):
            if isinstance(level.get(name), float):
                return round(1 / level[name])
    return 1


def _one(size: Any) -> int | None:
    """A side in pixels, of a number or a pair."""
    if isinstance(size, (list, tuple)) and size:
        size = size[0]
    return size if isinstance(size, int) else None
