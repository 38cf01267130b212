"""Tiny vision-language models of transformers' families, and packed rows of images and text for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vltrain.batch import Batch, ImageInputs
from vltrain.config.model.stock import StockConfig, StockSection
from vltrain.families.table import family_of
from vltrain.schema import IGNORE_INDEX

IMAGE, VIDEO, START, END = 299, 298, 297, 296
TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "head_dim": 16, "max_position_embeddings": 512, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VIT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
QWEN = {
    "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "patch_size": 8,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3,
}  # fmt: skip
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def _mrope(*section: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section), **more}


def _llava(vision: str, text: str, text_values: dict[str, Any] = TEXT, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llava",
        "vision_config": {"model_type": vision, **VIT},
        "text_config": {"model_type": text, **text_values},
        "image_token_id": IMAGE,
        **more,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "llava": _llava("clip_vision_model", "llama", vision_feature_layer=-2),
    "llava_siglip": _llava(
        "siglip_vision_model", "qwen3", vision_feature_layer=-1, vision_feature_select_strategy="full"
    ),
    "smolvlm": {
        "model_type": "smolvlm",
        "vision_config": dict(VIT),
        "text_config": {"model_type": "llama", **TEXT},
        "image_token_id": IMAGE,
        "scale_factor": 2,
    },
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "vision_config": {**QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        "text_config": {**TEXT, "num_hidden_layers": 3, "rope_parameters": _mrope(3, 3, 2, mrope_interleaved=True)},
        **QWEN_IDS,
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        "vision_config": {**QWEN, "window_size": 32, "fullatt_block_indexes": [1]},
        "text_config": {**TEXT, "rope_parameters": _mrope(2, 3, 3)},
        **QWEN_IDS,
    },
    "internvl": {
        "model_type": "internvl",
        "vision_config": {**VIT, "image_size": [32, 32], "patch_size": [8, 8]},
        "text_config": {"model_type": "qwen2", **TEXT},
        "image_token_id": IMAGE,
        "downsample_ratio": 0.5,
    },
    "gemma3": {
        "model_type": "gemma3",
        "vision_config": {"model_type": "siglip_vision_model", **VIT},
        "text_config": {"model_type": "gemma3_text", **TEXT, "sliding_window": 8},
        "image_token_id": IMAGE,
        "mm_tokens_per_image": 4,
    },
    "paligemma": {
        "model_type": "paligemma",
        "vision_config": {"model_type": "siglip_vision_model", **VIT, "projection_dim": 64},
        "text_config": {"model_type": "gemma", **TEXT},
        "image_token_id": IMAGE,
        "projection_dim": 64,
    },
    "paligemma2": {
        "model_type": "paligemma",
        "vision_config": {"model_type": "siglip_vision_model", **VIT, "projection_dim": 64},
        "text_config": {"model_type": "gemma2", **TEXT, "sliding_window": 8, "attn_logit_softcapping": 2.0},
        "image_token_id": IMAGE,
        "projection_dim": 64,
    },
    "qwen3_5": {
        "model_type": "qwen3_5",
        "vision_config": {**QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": []},
        "text_config": {
            **TEXT,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "rope_parameters": _mrope(1, 1, 0, mrope_interleaved=True, partial_rotary_factor=0.25),
        },
        **QWEN_IDS,
    },
}
VISUAL_TOKENS = {
    "llava": 16,
    "llava_siglip": 16,
    "paligemma": 16,
    "paligemma2": 16,
    "vipllava": 16,
}  # else 4 from a square of 32 x 32 pixels


def tiny(name: str, **changes: Any) -> StockConfig:
    """The section of a random one. `changes`: fields of `StockSection`; `adapter`, `bits`, `seed` of `StockConfig`."""
    outer = {key: changes.pop(key) for key in ("adapter", "bits", "seed") if key in changes}
    return StockConfig(stock=StockSection(config=CONFIGS[name], processor="none", **changes), **outer)


@dataclass
class Piece:
    """One sample: `images` numbers of pictures; a text of `before` tokens, the pictures, a text of `after` tokens."""

    images: tuple[int, ...]
    before: int
    after: int


def image_inputs(name: str, numbers: Sequence[int]) -> ImageInputs:
    """Pictures drawn from their numbers, as the family's processor hands them over; of Qwen-VL of several sizes."""
    tensors: list[dict[str, Tensor]] = []
    tokens: list[int] = []
    for number in numbers:
        draw = torch.Generator().manual_seed(1000 + number)
        if name.startswith("qwen"):
            rows = 4 if number % 2 else 2
            grid = torch.tensor([[1, rows, 4]])
            tensors.append({"pixel_values": torch.randn(4 * rows, 3 * 2 * 64, generator=draw), "image_grid_thw": grid})
            tokens.append(rows)
        elif name == "smolvlm":
            tiles = 1 + number % 2
            tensors.append({"pixel_values": torch.randn(1, tiles, 3, 32, 32, generator=draw)})
            tokens.append(4 * tiles)
        else:
            tensors.append({"pixel_values": torch.randn(1, 3, 32, 32, generator=draw)})
            tokens.append(VISUAL_TOKENS.get(name, 4))
    axis = 1 if name == "smolvlm" else 0
    merged = {
        key: torch.cat([one[key] for one in tensors], axis if key == "pixel_values" else 0)
        for key in (tensors[0] if tensors else ())
    }
    return ImageInputs(tensors=merged, tokens=torch.tensor(tokens, dtype=torch.int64))


def piece_ids(name: str, piece: Piece, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    parts = [torch.randint(3, 290, (piece.before,), generator=draw)]
    for number in piece.images:
        [count] = image_inputs(name, [number]).tokens.tolist()
        parts += [torch.tensor([START]), torch.full((count,), IMAGE), torch.tensor([END])]
    return torch.cat([*parts, torch.randint(3, 290, (piece.after,), generator=draw)])


def positions_of(core: Any, ids: Tensor, images: ImageInputs) -> Tensor:
    """Positions of one sample, as its family counts them: [L], or [4, L] for Qwen-VL (text, and three axes)."""
    family = family_of(core.config.model_type)
    plain = torch.arange(len(ids)) + family.first_position
    if not hasattr(core, "get_rope_index"):
        return plain
    kinds = (ids == IMAGE).long()[None]
    grids = {"image_grid_thw": images.tensors["image_grid_thw"]} if len(images) else {}
    found, _ = core.get_rope_index(ids[None], mm_token_type_ids=kinds, **grids)
    return torch.cat([plain[None], found[:, 0]])


def row_of(
    name: str, core: Any, pieces: Sequence[Piece], seed: int = 0, *, blank: bool = False, answered: bool = True
) -> Batch:
    """A packed row of samples, each distinct picture once.

    Args:
        blank: with a picture that no token shows.
        answered: the text behind the pictures is the answer, and has labels; else there are none.
    """
    numbers = list(dict.fromkeys(number for piece in pieces for number in piece.images))
    ids = [piece_ids(name, piece, seed + place) for place, piece in enumerate(pieces)]
    positions = [positions_of(core, row, image_inputs(name, piece.images)) for row, piece in zip(ids, pieces)]
    labels = []
    for row, piece in zip(ids, pieces):
        own = torch.full((len(row),), IGNORE_INDEX)
        if answered:
            own[-piece.after - 1 : -1] = row[-piece.after :]
        labels.append(own)
    joined = torch.cat(labels)
    images = image_inputs(name, numbers or ([7] if blank else []))
    flat = torch.cat(ids)
    return Batch(
        input_ids=flat,
        labels=joined,
        position_ids=torch.cat(positions, dim=-1),
        segment_lengths=torch.tensor([len(row) for row in ids]),
        pixels=images,
        image_slots=torch.tensor(
            [numbers.index(number) for piece in pieces for number in piece.images], dtype=torch.int64
        ),
        sample_ids=tuple(str(place) for place in range(len(pieces))),
        num_label_tokens=int((joined != IGNORE_INDEX).sum()),
        blocks=_blocks(name, flat, joined),
    )


def _blocks(name: str, ids: Tensor, labels: Tensor) -> Tensor:
    """A number for each run of image tokens, or for what stands in front of an answer, -1 elsewhere; [0] where the
    family is causal throughout."""
    kind = family_of(CONFIGS[name]["model_type"]).blocks
    if kind is None:
        return torch.empty(0, dtype=torch.int64)
    answers = torch.cat([torch.zeros(1, dtype=torch.bool), labels[:-1] != IGNORE_INDEX])
    inside = ids == IMAGE if kind == "images" else ~answers
    begins = inside & ~torch.cat([torch.zeros(1, dtype=torch.bool), inside[:-1]])
    return torch.where(inside, begins.long().cumsum(0) - 1, -1)


def section(name: str, changes: dict[str, Any]) -> StockConfig:
    """The section of a tiny random one with the recipe's keys `changes` ({"stock.tune": ..., "adapter.llm": ...})."""
    model = tiny(name)
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        place: Any = model
        for one in sections:
            place = getattr(place, one)
        setattr(place, leaf, tuple(value) if isinstance(value, list) else value)
    return model
