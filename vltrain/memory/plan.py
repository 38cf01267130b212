"""The memory plan of a recipe: what each rank holds, by kind, and whether a card has room for it.

    recipe, DeepSpeed's JSON, ranks -> outline of the model -> weights (`weights`), ZeRO (`zero`), one pack (`rehearse`)
    -> peak

The peak is what is held all the time and the larger of two phases that never meet: forward and backward, or the
optimizer's step. Trade-off: everything is taken to be largest at once within a phase, so real peaks are lower
rather than higher.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from vltrain.config.schema import Config
from vltrain.data.flat.index import Index
from vltrain.data.shards import PackedDataset
from vltrain.memory.rehearse import Activations, PackSize, make_blip_pack, make_pack, make_stock_pack, rehearse
from vltrain.memory.weights import WeightPlan
from vltrain.memory.zero import FP32, ZeroMemory, zero_memory
from vltrain.models.build import build_model, count_parameters
from vltrain.models.flops import Flops
from vltrain.models.interface import VisionLanguageModel

GIB = 2**30
# Allowances, not measured here: CUDA's context with its kernels and workspaces; NCCL's channels where there are several
# ranks.
CUDA_CONTEXT_BYTES, NCCL_BYTES = int(0.75 * GIB), int(0.5 * GIB)
# What torch sees of common cards.
CARDS_GIB = {"24 GB": 23.6, "40 GB": 39.4, "80 GB": 79.1, "141 GB": 139.8}
TIGHT_SHARE = 0.9
AVERAGES = 2  # that AdaLoRA keeps of each number: of its importance, and of how that varies
# Where nothing says how a pack will look: an image in every so many tokens, and half of its text to be predicted.
TOKENS_PER_IMAGE = 256
REHEARSED = "kept", "recomputed"  # activations without and with activation checkpointing
MEASURED_PACKS = 1 << 16  # at most so many, whose images stand for those of all


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of one rank; `held`, `at_work`, `in_step` and `host` as in `ZeroMemory`, with all else that a rank
    needs."""

    held: dict[str, int]
    at_work: dict[str, int]
    in_step: dict[str, int]
    host: dict[str, int]
    activations: Mapping[str, Activations] = field(default_factory=dict[str, Activations])
    """Of each of `REHEARSED`, found when it is asked for."""

    @property
    def peak(self) -> int:
        return sum(self.held.values()) + max(sum(self.at_work.values()), sum(self.in_step.values()))

    def verdict(self, gib: float) -> str:
        """`fits`, `tight` (less than a tenth left, which fragmentation may need) or `too small`, for a card of that
        much memory."""
        share = self.peak / (gib * GIB)
        return "fits" if share <= TIGHT_SHARE else "tight" if share <= 1 else "too small"


def plan_memory(
    config: Config,
    ds_config: dict[str, Any],
    world_size: int,
    *,
    groups: Callable[[VisionLanguageModel], list[list[nn.Parameter]]],
    pack: PackSize,
    bits: int | None,
    dtype: torch.dtype,
    activations: Mapping[str, Activations] | None = None,
) -> MemoryPlan:
    """What one rank needs to train a recipe whose model can be built on the meta device.

    Args:
        ds_config: with its "auto"s filled in.
        groups: the optimizer's groups of a model's trained parameters.
        pack: the largest.
        bits, dtype: of frozen weights (None: dtype), of matrix products.
        activations: of another plan of this recipe and pack; None: they are found.

    Raises: InputError for settings of ZeRO that are not planned for, and for bits without effect.
    """
    model = build_model(config.model, device="meta")
    weights = WeightPlan(model, bits, dtype)
    leaves = ds_config.get("zero_optimization", {}).get("leaf_module", {})
    zero = zero_memory(
        ds_config,
        world_size,
        frozen=weights.frozen_by_kind(),
        largest_module=_largest_module(model, leaves.get("classes", [])),
        groups=[[weights.as_kept(parameter) for parameter in group] for group in groups(model)],
    )
    unpacked = weights.unpacked_bytes
    if activations is None:
        activations = _Rehearsals(partial(_rehearse, config, pack, bits, dtype))
    return _put_together(
        config, model.BRIDGE, zero, activations, AVERAGES * FP32 * adalora_size(model), unpacked, world_size
    )


class _Rehearsals(dict[str, Activations]):
    """Activations of a model and a pack, each way found when it is first asked for."""

    def __init__(self, find: Callable[..., Activations]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, name: str) -> Activations:
        self[name] = found = self._find(checkpointing=name == "recomputed")
        return found


def _rehearse(
    config: Config, pack: PackSize, bits: int | None, dtype: torch.dtype, *, checkpointing: bool
) -> Activations:
    model = build_model(config.model, device="meta", activation_checkpointing=checkpointing)
    weights = WeightPlan(model, bits, dtype)
    if model.instruction is not None:
        instruction_tokens = config.model.tokenizers.instruction_tokens
        batch = make_blip_pack(pack, model.visual_tokens, model.image_size, instruction_tokens)
    elif model.nominal_images(0) is not None:
        batch = make_stock_pack(pack, model)
    else:
        batch = make_pack(pack, model.visual_tokens, model.image_size)
    keeps = config.train.keep_image_features
    return rehearse(model, batch, dtype, weights.computed_dtype, keeps_features=keeps)


def _put_together(
    config: Config,
    bridge: str,
    zero: ZeroMemory,
    activations: Mapping[str, Activations],
    averages: int,
    unpacked: int,
    world_size: int,
) -> MemoryPlan:
    now = activations["recomputed" if config.train.activation_checkpointing else "kept"]
    at_work = {
        **zero.at_work, "image features": now.features, "activations, ViT": now.vision,
        f"activations, {bridge}, LLM and loss": now.rest,
        "working memory of forward and backward": now.working, "a packed weight, unpacked": unpacked,
    }  # fmt: skip
    context = CUDA_CONTEXT_BYTES + (NCCL_BYTES if world_size > 1 else 0)
    return MemoryPlan(
        held=_sizeable({**zero.held, "AdaLoRA's averages": averages, "CUDA and NCCL (allowance)": context}),
        at_work=_sizeable(at_work),
        in_step=_sizeable(zero.in_step),
        host=_sizeable(zero.host),
        activations=activations,
    )


def _sizeable(kinds: dict[str, int]) -> dict[str, int]:
    return {kind: num_bytes for kind, num_bytes in kinds.items() if num_bytes}


def _largest_module(model: VisionLanguageModel, leaves: Collection[str]) -> int:
    """Numbers in the largest set of parameters that ZeRO-3 gathers at once: what one module owns itself, or all of a
    leaf (`vltrain.train.zero.ds_config.leaf_classes`)."""
    return max(
        sum(parameter.numel() for parameter in module.parameters(recurse=type(module).__name__ in leaves))
        for module in model.modules()
    )


def _some_packs(index: Index) -> np.ndarray:
    return np.linspace(0, len(index) - 1, min(len(index), MEASURED_PACKS), dtype=np.int64)


def largest_pack(config: Config, visual_tokens: int, packs: PackedDataset | None) -> PackSize:
    """The pack to plan for: the largest numbers of the packs there are, else what the recipe allows, else an
    estimate. Images of many sizes are as many of the size that the tower was made for."""
    num_tokens = config.data.pack_length
    if packs is not None:
        index = packs.index
        most = {name: int(getattr(index, name)[:].max()) for name in ("num_tokens", "num_images", "num_label_tokens")}
        shown = int(packs.image_tokens(_some_packs(index))[0].max())
        if shown:
            most["num_images"] = -(-shown // visual_tokens)
        return PackSize(
            **most,
            num_segments=max(1, round(float(index.num_samples[:].mean()))),
            origin="the largest of the packs found",
        )
    num_images = config.data.max_images
    estimate = f"an estimate, one in {TOKENS_PER_IMAGE} tokens (--data.max_images says otherwise)"
    origin = estimate if num_images is None else "data.max_images"
    num_images = min(
        -(-num_tokens // TOKENS_PER_IMAGE) if num_images is None else num_images, (num_tokens - 2) // visual_tokens
    )
    num_labels = (num_tokens - num_images * visual_tokens) // 2
    return PackSize(
        num_tokens=num_tokens, num_images=num_images, num_label_tokens=num_labels, num_segments=max(1, num_images),
        origin=f"tokens: data.pack_length; images: {origin}; labels: an estimate, half of the text",
    )  # fmt: skip


def adalora_size(model: nn.Module) -> int:
    """Numbers in the updates whose importance AdaLoRA averages; 0 without AdaLoRA."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if ".lora_" in name}
    layers = {name.partition(".lora_E.")[0] for name in sizes if ".lora_E." in name}
    return sum(size for name, size in sizes.items() if name.partition(".lora_")[0] in layers)


def parameters_by_part(model: VisionLanguageModel) -> dict[str, dict[str, int]]:
    """{part: {"total", "trainable"}} of the parts of such a model, and their sums as "all"."""
    counts = count_parameters(model)
    counts["all"] = (sum(total for total, _ in counts.values()), sum(trained for _, trained in counts.values()))
    return {part: {"total": total, "trainable": trained} for part, (total, trained) in counts.items()}


def checkpoint_bytes(num_trained: int, num_averaged: int = 0) -> int:
    """Disk space of one checkpoint: weight and both of AdamW's averages, and both of AdaLoRA's of `num_averaged`
    numbers, fp32."""
    return 3 * FP32 * num_trained + AVERAGES * FP32 * num_averaged


def step_flops(config: Config, flops: Flops, pack: PackSize, packs: PackedDataset | None) -> float:
    """Operations of an optimizer step over all ranks, by what `flops` says that each costs: of an average step of the
    packs there are, else of as many full packs."""
    if packs is None:
        mean = {"num_tokens": pack.num_tokens, "num_images": pack.num_images, "num_label_tokens": pack.num_label_tokens}
        mean["num_pairs"] = pack.num_tokens**2 / pack.num_segments
    else:
        index = packs.index
        names = "num_tokens", "num_images", "num_label_tokens"
        mean = {name: float(getattr(index, name)[:].mean()) for name in names}
        mean["num_pairs"] = float(index.sum_squares[:].mean())
        if flops.image.tokens:
            mean["num_images"] = float(packs.images_of_size(flops.image, _some_packs(index)).mean())
    return config.train.packs_per_step * flops.of(**mean)
