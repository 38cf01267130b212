"""DeepSpeed's JSON and the recipe become one configuration: every value has one owner.

The JSON owns memory and communication (ZeRO stage, offload, buckets). The recipe owns optimisation (learning rate,
batch, clipping, precision). In the JSON the recipe's values stand as "auto"; a number there must agree with the recipe,
or the run is refused. Buckets that stand as "auto" follow the number of trained parameters; a number there is taken as
it is.
This module does not import deepspeed, so that a recipe can be checked anywhere.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vltrain.config.schema import Config
from vltrain.errors import InputError
from vltrain.files.strict_json import read_object
from vltrain.shipped import find_ds_json
from vltrain.train.zero.ds_schema import AUTO, check_ds_json

# Numbers that a bucket of gradients or of updated weights holds at most where the JSON leaves it open. DeepSpeed
# allocates a gradient bucket at its full size, two with overlap_comm. ZeRO-3's prefetch and persistence are about
# frozen weights, too, and are not filled.
LARGEST_BUCKETS = {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 200_000_000}
ALIGNMENT = 2  # of an allgather bucket, which DeepSpeed asserts


def load_ds_json(path: str | Path | None) -> dict[str, Any]:
    """Reads a DeepSpeed JSON file, or one of ds_configs by its name; None: where the user names none, ZeRO-2 with
    buckets for what is trained and DeepSpeed's defaults.

    Raises: InputError if it is missing, not JSON or not an object; a key twice is refused too.
    """
    if path is None:
        return {"zero_optimization": {"stage": 2, **dict.fromkeys(LARGEST_BUCKETS, AUTO)}}
    found = find_ds_json(str(path))
    try:
        return read_object(found, "a DeepSpeed JSON; ready ones are in ds_configs/")
    except InputError as error:
        raise InputError(f"--ds {error}") from None


def micro_steps_per_step(packs_per_step: int, world_size: int) -> int:
    """Micro-steps G that `world_size` ranks need for one step's packs, one pack a rank and micro-step."""
    return math.ceil(packs_per_step / world_size)


def zero_stage(raw: dict[str, Any]) -> int:
    """The ZeRO stage a DeepSpeed configuration asks for, 0 to 3. Raises InputError for anything else."""
    stage = raw.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise InputError(f"zero_optimization.stage: found {stage!r}, expected 0, 1, 2 or 3")
    return stage


def as_zero2(raw: dict[str, Any]) -> dict[str, Any]:
    """The JSON of ZeRO-3 for ZeRO-2: without what only that reads, and with buckets for what is trained."""
    zero = raw.get("zero_optimization", {})
    kept = {key: zero[key] for key in ("overlap_comm", "contiguous_gradients", "offload_optimizer") if key in zero}
    return {**raw, "zero_optimization": {**kept, "stage": 2, **dict.fromkeys(LARGEST_BUCKETS, AUTO)}}


def offloads_optimizer(raw: dict[str, Any]) -> bool:
    """Whether the optimizer's states are kept in CPU memory."""
    return raw.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"


def fill_in(raw: dict[str, Any], num_trained: int, blocks: Collection[str] = ()) -> dict[str, Any]:
    """The JSON with what follows from the model.

    Buckets that say "auto" hold all of `num_trained` parameters, up to `LARGEST_BUCKETS`. At ZeRO-3
    `leaf_module.classes` ("auto" where the JSON is silent) become the classes of the LLM's blocks: a block's weights
    are gathered together, where DeepSpeed would gather for each of its modules, with hooks of their own.

    Args:
        blocks: names of those classes.

    DeepSpeed takes a leaf's gradients when that of its first argument is there, which is seen to for the LLM's blocks
    alone.

    Raises: InputError for leaves of other classes.
    """
    filled = copy.deepcopy(raw)
    zero = filled.get("zero_optimization", {})
    wanted = max(ALIGNMENT, math.ceil(num_trained / ALIGNMENT) * ALIGNMENT)
    for key, largest in LARGEST_BUCKETS.items():
        if zero.get(key) == AUTO:
            zero[key] = min(wanted, largest)
    if zero_stage(filled) == 3:
        leaves = zero.setdefault("leaf_module", {}).setdefault("classes", AUTO)
        zero["leaf_module"]["classes"] = found = sorted(blocks) if leaves == AUTO else leaves
        if others := [name for name in found if name not in blocks]:
            raise InputError(
                f"DeepSpeed's 'zero_optimization.leaf_module.classes': found {others[0]!r}, expected "
                f'{", ".join(sorted(blocks)) or "none"} (the blocks of this LLM), [] or "auto"'
            )
    return filled


def leaf_classes(resolved: dict[str, Any]) -> list[str]:
    """Classes of the modules whose weights ZeRO-3 gathers together."""
    return resolved.get("zero_optimization", {}).get("leaf_module", {}).get("classes", [])


def resolve_ds_config(
    raw: dict[str, Any],
    config: Config,
    world_size: int,
    num_trained: int | None = None,
    blocks: Collection[str] = (),
) -> dict[str, Any]:
    """Fills the "auto" values of a DeepSpeed configuration from the recipe and the model.

    Args:
        raw: the JSON as the user wrote it; not changed.
        config: the recipe.
        world_size: number of ranks.
        num_trained: trained parameters of the model. None: there is none yet and all else is checked; buckets that say
            "auto" go on saying so.
        blocks: classes of its LLM's blocks, see `fill_in`.

    Returns:
        A configuration of numbers only, ready for `deepspeed.initialize`; see `num_trained`.

    Raises:
        InputError: an unknown key, a value of a wrong type, one that contradicts the recipe or belongs to it alone, an
            "auto" nobody fills, and a feature that is refused, see `vltrain.train.zero.ds_schema`.
    """
    check_ds_json(raw)
    resolved = copy.deepcopy(raw) if num_trained is None else fill_in(raw, num_trained, blocks)
    if zero_stage(raw) != 3 and "leaf_module" in raw.get("zero_optimization", {}):
        raise InputError(
            f"DeepSpeed's 'zero_optimization.leaf_module' would have no effect at stage {zero_stage(raw)}: weights are "
            "gathered at stage 3 alone; remove it"
        )
    if num_trained is None:
        resolved.get("zero_optimization", {}).pop("leaf_module", None)  # of no meaning where weights are only cut up
    zero_stage(resolved)
    _resolve_optimizer(resolved, config)
    _resolve_precision(resolved)
    _resolve_batch(resolved, config, world_size)
    if zero_stage(resolved) == 3:
        _require_fits_zero3(resolved, config)
    # DeepSpeed's own progress lines are replaced by the monitor's.
    resolved.setdefault("steps_per_print", 2**31 - 1)
    return resolved


def _resolve_batch(resolved: dict[str, Any], config: Config, world_size: int) -> None:
    """The recipe says how many packs a step has, and at which norm gradients are clipped."""
    num_micro_steps = micro_steps_per_step(config.train.packs_per_step, world_size)
    owned = {
        "train_micro_batch_size_per_gpu": (1, "one pack is one micro-batch; data.pack_length is its size"),
        "gradient_accumulation_steps": (
            num_micro_steps,
            f"train.packs_per_step = {config.train.packs_per_step} over {world_size} rank(s)",
        ),
        "train_batch_size": (
            num_micro_steps * world_size,
            f"train.packs_per_step = {config.train.packs_per_step} over {world_size} rank(s)",
        ),
        "gradient_clipping": (config.optim.clip, f"optim.clip = {config.optim.clip}"),
    }
    for key, (value, reason) in owned.items():
        found = resolved.get(key, AUTO)
        if found != AUTO and found != value:
            raise InputError(
                f"DeepSpeed's '{key}' is {found!r} but the recipe says {value!r} ({reason}); write \"auto\" or "
                "change the recipe"
            )
        resolved[key] = value
    for key, value in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
        if resolved.get(key, value) != value:
            raise InputError(
                f"DeepSpeed's '{key}' is {resolved[key]!r}, expected {value!r}: the loss is normalised over all "
                "ranks already"
            )


def _require_fits_zero3(resolved: dict[str, Any], config: Config) -> None:
    if config.model.bits in (4, 8):
        raise InputError(
            f"DeepSpeed's 'zero_optimization.stage' is 3 and model.bits is {config.model.bits}: ZeRO-3 partitions "
            "weights across ranks and would separate quantised ones from their scales; take stage 2 (all quantised "
            "weights on each rank) or bits 16"
        )
    if resolved["zero_optimization"].setdefault("memory_efficient_linear", False) is not False:
        raise InputError(
            "DeepSpeed's 'zero_optimization.memory_efficient_linear' is "
            f"{resolved['zero_optimization']['memory_efficient_linear']!r}, expected false: "
            "it replaces torch's linear by one that autocast does not cover everywhere, so that ZeRO-3 in bf16 "
            "would give other results than the other stages; remove it"
        )


def _resolve_optimizer(resolved: dict[str, Any], config: Config) -> None:
    """The recipe builds the optimizer and its schedule; the JSON may only say the same."""
    section = resolved.pop("optimizer", None)
    if section is not None:
        if section.get("type", AUTO) not in (AUTO, "AdamW"):
            raise InputError(
                f"DeepSpeed's 'optimizer.type' is {section['type']!r}; the recipe's optimizer is AdamW (section "
                "`optim`)"
            )
        optim = config.optim
        said = {"lr": optim.lr, "betas": list(optim.betas), "eps": optim.eps, "weight_decay": optim.weight_decay}
        for key, found in section.get("params", {}).items():
            if key in said and found not in (AUTO, said[key]):
                raise InputError(
                    f"DeepSpeed's 'optimizer.params.{key}' is {found!r} but the recipe says optim.{key} = "
                    f'{said[key]!r}; write "auto"'
                )
            if key not in said and found != AUTO:
                raise InputError(
                    f"DeepSpeed's 'optimizer.params.{key}' would have no effect: the optimizer is built from "
                    "the recipe's section `optim`"
                )
    scheduler = resolved.pop("scheduler", None)
    if scheduler is not None and any(
        value != AUTO for value in [scheduler.get("type", AUTO), *scheduler.get("params", {}).values()]
    ):
        raise InputError(
            "DeepSpeed's 'scheduler' would have no effect: warm-up and cosine are the recipe's (section "
            '`optim`); remove it or write "auto"'
        )


def _resolve_precision(resolved: dict[str, Any]) -> None:
    """Precision is the recipe's: frozen weights in bf16, trained ones in fp32 under autocast (train.precision)."""
    for key in ("bf16", "bfloat16", "fp16", "torch_autocast"):
        section = resolved.pop(key, None)
        if section is not None and section.get("enabled", AUTO) not in (AUTO, False):
            raise InputError(
                f"DeepSpeed's '{key}.enabled' is {section['enabled']!r}: precision belongs to the recipe "
                '(train.precision); write "auto"'
            )
