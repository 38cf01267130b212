"""A model small enough to run in milliseconds, and rows for it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vltrain.batch import Batch
from vltrain.config.model.mmt import AdapterConfig, LLMConfig, MmtConfig, NeckConfig, VisionConfig
from vltrain.schema import IGNORE_INDEX, IMAGE_MODALITY_TOKEN, IMAGE_TOKEN, TEXT_MODALITY_TOKEN

VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
LLM = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
}
VISUAL_TOKENS = 2


def tiny_config(
    *,
    vision: dict[str, Any] | None = None,
    llm: dict[str, Any] | None = None,
    adapter: dict[str, Any] | None = None,
    **model: Any,
) -> MmtConfig:
    """A ViT of 5 blocks with taps after 2 and 4, and a LLaMA of 3 blocks with grouped-query attention."""
    vision, llm = vision or {}, llm or {}
    return MmtConfig(
        vision=VisionConfig(**{"config": VISION, "tap_every": 2, **vision}),
        llm=LLMConfig(**{"config": LLM, "tokenizer": "none", **llm}),
        adapter=AdapterConfig(**{"dim": 4, **(adapter or {})}),
        **{"neck": NeckConfig(dim=6), **model},
    )


def make_batch(
    segments: list[tuple[int, list[int]]],
    *,
    num_images: int,
    seed: int = 0,
    is_filler: bool = False,
    labels: bool = True,
) -> Batch:
    """A row of random text. `segments`: (number of text tokens, images that stand in front of them)."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    targets: list[int] = []
    lengths, slots = [], []
    for num_text, images in segments:
        text = torch.randint(LLM["vocab_size"], (num_text,), generator=generator).tolist()
        row = [
            IMAGE_MODALITY_TOKEN if images else TEXT_MODALITY_TOKEN,
            *[IMAGE_TOKEN] * (VISUAL_TOKENS * len(images)),
            *text,
        ]
        keep = (num_text + 1) // 2 if labels else 0
        targets += [IGNORE_INDEX] * (len(row) - 1 - keep) + row[len(row) - keep :] + [IGNORE_INDEX]
        ids += row
        lengths.append(len(row))
        slots += images
    target = torch.tensor(targets)
    return Batch(
        input_ids=torch.tensor(ids),
        labels=target,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        segment_lengths=torch.tensor(lengths),
        pixels=torch.randint(256, (num_images, 3, 32, 32), dtype=torch.uint8, generator=generator),
        image_slots=torch.tensor(slots, dtype=torch.int64),
        sample_ids=tuple(f"sample-{number}" for number in range(len(lengths))),
        num_label_tokens=int((target != IGNORE_INDEX).sum()),
        is_filler=is_filler,
    )


def randomise_adapters(model: torch.nn.Module) -> None:
    """Moves every adapter away from the identity it starts as, so that tests see it."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device) * 0.2)


def mixed_batch() -> Batch:
    """Four segments: with one image, without, with two (one of them shown before), with one shown before."""
    return make_batch([(7, [0]), (5, []), (9, [1, 0]), (4, [2])], num_images=3)


def counted_flops(counter: FlopCounterMode) -> int:
    """What was counted, without the rotary embedding's angles, which some releases of transformers make by a matrix
    product."""
    angles = [
        sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name.endswith(".rotary_emb")
    ]
    return counter.get_total_flops() - sum(angles)
