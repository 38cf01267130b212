"""What a pack's forward and backward keep in memory, found by running the real model on tensors without memory.

Torch's fake tensors have shapes, dtypes and a graph but no numbers, so 7 billion weights and their activations cost a
few seconds and no memory. Nothing is derived by hand: adapters, LoRA, checkpointing and autocast's copies of weights
are what the model makes of them. The run is a CPU's; layer norms are made to compute in fp32 as autocast has it on
CUDA, and torch's fused attention keeps the same tensors on both. Trade-off: not counted are kernels' workspaces, and
attention by flash-attn, which saves SDPA's padding (at most a fifth).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vltrain.batch import Batch, ImageFeatures, ImageInputs, Shown
from vltrain.data.loader import batch_of
from vltrain.data.pictures import SquareReader
from vltrain.memory.live import LiveMemory
from vltrain.models.interface import VisionLanguageModel
from vltrain.models.without_numbers import Answers, take_numbers
from vltrain.schema import IGNORE_INDEX, IMAGE_MODALITY_TOKEN, IMAGE_TOKEN, TEXT_MODALITY_TOKEN, Segment


@dataclass(frozen=True, kw_only=True)
class PackSize:
    """What decides how much memory a pack needs; `origin` says where the numbers come from."""

    num_tokens: int
    num_images: int
    num_label_tokens: int
    num_segments: int
    origin: str


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes that a pack needs beside weights and gradients.

    vision, rest: kept from forward to backward in the ViT; in neck or Q-Former, LLM and loss head.
    working: the most there is above that, in forward or backward: blocks at work or recomputed, one weight's gradient.
    head: of the head and its loss while they run, above what is kept then. Not more than `working`, of which it is
    part.
    features: of the images' kept features, which go in with the pack; 0 where images do.
    """

    vision: int
    rest: int
    working: int
    head: int
    features: int = 0

    @property
    def kept(self) -> int:
        return self.vision + self.rest

    @property
    def peak(self) -> int:
        return self.kept + self.working


def make_pack(size: PackSize, visual_tokens: int, image_size: int) -> Batch:
    """A batch of that size: segments of equal lengths, images assigned to them in turn, labels at their ends.

    Images or labels that the tokens leave no room for are left out.
    """
    lengths, num_images_of = _segments_of(size, visual_tokens)
    num_segments = len(lengths)
    input_ids, may_predict = [], []
    for length, images in zip(lengths, num_images_of):
        head = [IMAGE_MODALITY_TOKEN if images else TEXT_MODALITY_TOKEN, *[IMAGE_TOKEN] * int(images * visual_tokens)]
        input_ids += [*head, *[0] * int(length - len(head))]
        may_predict += [False] * (len(head) - 1) + [True] * int(length - len(head)) + [False]
    places = np.flatnonzero(may_predict)
    labelled = places[np.linspace(0, len(places) - 1, min(size.num_label_tokens, len(places))).astype(np.int64)]
    labels = np.full(size.num_tokens, IGNORE_INDEX)
    labels[labelled] = 0
    num_images = int(num_images_of.sum())
    return Batch(
        input_ids=torch.tensor(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.cat([torch.arange(length) for length in lengths.tolist()]),
        segment_lengths=torch.from_numpy(lengths),
        pixels=torch.empty(num_images, 3, image_size, image_size, dtype=torch.uint8),
        image_slots=torch.arange(num_images),
        sample_ids=tuple(f"segment-{number}" for number in range(num_segments)),
        num_label_tokens=len(labelled),
    )


def make_stock_pack(size: PackSize, model: VisionLanguageModel) -> Batch:
    """The same for a model that reads its own image tokens, and images as its processor hands them over."""
    squares = make_pack(size, model.visual_tokens, 1)
    images = model.nominal_images(len(squares.image_slots))
    assert images is not None, "asked of a model with a processor"
    input_ids = torch.where(squares.input_ids == IMAGE_TOKEN, model.image_token, squares.input_ids.clamp(min=0))
    return replace(squares, input_ids=input_ids, pixels=images)


def make_blip_pack(size: PackSize, visual_tokens: int, image_size: int, instruction_tokens: int) -> Batch:
    """The same for an InstructBLIP: images in front, an answer at each segment's end, and a prompt of
    `instruction_tokens` at most for the Q-Former."""
    lengths, num_images_of = _segments_of(size, visual_tokens)
    text = lengths - num_images_of * visual_tokens
    answers = np.minimum(np.ceil(size.num_label_tokens / len(lengths)), text - 1).astype(np.int64)
    prompts = np.clip(text - answers, 1, instruction_tokens)
    segments = []
    for number, (length, shown, answer, prompt) in enumerate(
        zip(lengths, num_images_of, answers, prompts, strict=True)
    ):
        names = tuple(f"{number}/{image}" for image in range(shown))
        input_ids, places = np.zeros(length, np.int32), np.arange(length)
        input_ids[places < shown * visual_tokens] = IMAGE_TOKEN
        mask, read = places >= length - answer, np.zeros(prompt, np.int32)
        segments.append(
            Segment(
                sample_id=f"segment-{number}", input_ids=input_ids, loss_mask=mask, images=names, instruction_ids=read
            )
        )
    reader = SquareReader(size=image_size)
    images = dict.fromkeys((name for segment in segments for name in segment.images), reader.blank())
    return batch_of(segments, images, reader)


def _segments_of(size: PackSize, visual_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each segment its length, and how many images stand in it: int64 [S] both."""
    num_segments = max(1, min(size.num_segments, size.num_tokens // 2))
    lengths = np.full(num_segments, size.num_tokens // num_segments)
    lengths[: size.num_tokens % num_segments] += 1
    room = (lengths - 2) // visual_tokens
    num_images_of = np.zeros(num_segments, np.int64)
    for _ in range(min(size.num_images, int(room.sum()))):
        open_segments = np.flatnonzero(num_images_of < room)
        num_images_of[open_segments[np.argmin(num_images_of[open_segments])]] += 1
    return lengths, num_images_of


def rehearse(
    model: VisionLanguageModel,
    batch: Batch,
    dtype: torch.dtype,
    frozen_dtype: Callable[[nn.Parameter], torch.dtype],
    *,
    keeps_features: bool = False,
) -> Activations:
    """Runs one pack forward and backward on the outline of a model, which is of no other use afterwards.

    Args:
        model: from `build_model` on the meta device, with or without activation checkpointing.
        batch: any, for instance `make_pack`'s or `make_blip_pack`'s; its numbers do not matter.
        dtype: of matrix products: fp32, or bf16 by autocast.
        frozen_dtype: of each frozen parameter as it is computed with; trained ones are fp32.
        keeps_features: the images' features go in (`train.keep_image_features`).
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    weights = take_numbers(model, mode, frozen_dtype)
    with mode:
        batch.pixels = _fake(batch.pixels)
    if dtype == torch.bfloat16:
        for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
            norm.forward = partial(_layer_norm_in_fp32, norm)
    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    if keeps_features and len(batch.pixels):
        with Answers(), cast, torch.no_grad():
            batch.pixels = model.image_features(batch.pixels)
    for weight in weights:
        if weight.requires_grad:  # where gradients are gathered is ZeRO's affair
            weight.register_post_accumulate_grad_hook(_drop_gradient)
    given = [value for value in vars(batch).values() if isinstance(value, Tensor)]
    given += batch.pixels.tensors.values() if isinstance(batch.pixels, ImageInputs) else ()
    features = [batch.pixels.rows] if isinstance(batch.pixels, ImageFeatures) else []
    given += features
    live = LiveMemory(ignored=[*weights, *model.buffers(), *given])
    seen = _watch(model, live)
    with Answers(), live:
        with cast:
            output = model(batch)
        kept = live.live_bytes
        output.loss_sum.backward()
    peak = max(live.restart_peak(), seen["peak"])
    return Activations(
        vision=seen["vision"],
        rest=kept - seen["vision"],
        working=peak - kept,
        head=min(seen["head"], peak - kept),
        features=sum(one.nbytes for one in features),
    )


def _fake(pixels: Shown) -> Tensor | ImageInputs:
    assert not isinstance(pixels, ImageFeatures), "images, of which a model makes features"
    if isinstance(pixels, Tensor):
        return torch.empty(pixels.shape, dtype=pixels.dtype)
    tensors = {
        name: torch.empty(one.shape, dtype=one.dtype) if one.is_floating_point() else one
        for name, one in pixels.tensors.items()
    }
    return replace(pixels, tensors=tensors)  # whole numbers are sizes, which the model reads


def _watch(model: VisionLanguageModel, live: LiveMemory) -> dict[str, int]:
    """Hooks that note what the ViT leaves behind and what the head needs while it runs; `peak` is that of before and in
    the head."""
    seen = {"vision": 0, "head": 0, "peak": 0}

    def after_vision(*_: object) -> None:
        seen["vision"] = live.live_bytes

    def before_head(*_: object) -> None:
        seen["peak"] = live.restart_peak()

    def after_head(*_: object) -> None:
        seen["head"] = live.peak_bytes - live.live_bytes
        seen["peak"] = max(seen["peak"], live.peak_bytes)

    model.vision.register_forward_hook(after_vision)
    model.llm.lm_head.register_forward_pre_hook(before_head)
    model.llm.lm_head.register_forward_hook(after_head)
    return seen


def _layer_norm_in_fp32(norm: nn.LayerNorm, states: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        weights = (None if weight is None else weight.float() for weight in (norm.weight, norm.bias))
        return F.layer_norm(states.float(), norm.normalized_shape, *weights, norm.eps)


def _drop_gradient(weight: Tensor) -> None:
    weight.grad = None
