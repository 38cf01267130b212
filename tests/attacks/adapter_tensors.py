"""Tensors of adapters, the models that they belong to, and what is exported of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig
from safetensors.torch import load_file
from torch import Tensor

from tests.attacks.adapters import (
    ADALORA,
    BOTH,
    EXPORTS,
    MADE,
    ORIGIN,
    PRECISION,
    QUERY,
    TENSORS,
    _as_stock,
    _each,
    _refused,
)
from tests.attacks.attack import AttackFailed, Shown, attack, refused
from tests.support.peft_folders import (
    WEIGHTS,
    base,
    by_stock_peft,
    edit,
    edit_weights,
    exported,
    save_run,
)
from vltrain.models.build import build_model

# ---- tensors


@attack(TENSORS)
def odd_numbers(folder: Path) -> Shown:
    """A factor of NaN, Inf, whole numbers, booleans, complex numbers, 8-bit floats."""
    key = f"base_model.model.{QUERY}.lora_A.weight"
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "nan": lambda value: value.index_fill(0, torch.tensor([1]), math.nan),
        "inf": lambda value: value.index_fill(1, torch.tensor([2]), -math.inf),
        "int": lambda value: value.mul(100).int(),
        "bool": lambda value: value > 0,
        "fp8": lambda value: value.to(torch.float8_e4m3fn),
    }

    def case(place: Path, change: Callable[[Tensor], Tensor]) -> Shown:
        return _refused(
            edit_weights(exported(place, "llama", **MADE), lambda weights: {**weights, key: change(weights[key])}), key
        )

    def complex_case(place: Path) -> Shown:
        made = exported(place, "llama", **MADE)
        weights = load_file(made / WEIGHTS)
        (made / WEIGHTS).unlink()
        torch.save({**weights, key: weights[key].to(torch.complex64)}, made / "adapter_model.bin")
        return _refused(made, key, "complex64")

    return _each(
        {
            **{name: lambda place, change=change: case(place, change) for name, change in changes.items()},
            "complex": complex_case,
        },
        folder,
    )


@attack(TENSORS)
def nan_in_what_is_tuned_whole(folder: Path) -> Shown:
    """Query tokens, or the projection, that are NaN: no factor, but loaded all the same."""

    def case(place: Path, name: str) -> Shown:
        key = f"base_model.model.{name}"
        return _refused(
            edit_weights(exported(place, "llama", **MADE), lambda weights: {**weights, key: weights[key] * math.nan}),
            key,
            "NaN",
        )

    return _each(
        {name: lambda place, name=name: case(place, name) for name in ("query_tokens", "language_projection.bias")},
        folder,
    )


@attack(TENSORS)
def half_precision(folder: Path) -> Shown:
    """Factors in bf16 and fp16: the numbers that they are, as stock peft reads them."""
    halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return _each(
        {
            name: lambda place, kind=kind: _as_stock(
                edit_weights(
                    exported(place, "llama", **MADE), lambda all: {key: value.to(kind) for key, value in all.items()}
                )
            )
            for name, kind in halves.items()
        },
        folder,
    )


@attack(TENSORS)
def wrong_shapes(folder: Path) -> Shown:
    """A factor transposed, flat, of another width, without an axis; query tokens too few."""
    key = f"base_model.model.{QUERY}.lora_A.weight"
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "transposed": lambda value: value.t().contiguous(),
        "flat": Tensor.flatten,
        "wide": lambda value: torch.cat([value, value], dim=1),
        "scalar": lambda value: value[0, 0].clone(),
        "empty": lambda value: value[:0].clone(),
    }

    def case(place: Path, key: str, change: Callable[[Tensor], Tensor]) -> Shown:
        return _refused(
            edit_weights(exported(place, "llama", **MADE), lambda weights: {**weights, key: change(weights[key])}),
            key,
            "is due",
        )

    queries = "base_model.model.query_tokens"
    return _each(
        {
            **{name: lambda place, change=change: case(place, key, change) for name, change in changes.items()},
            "queries": lambda place: case(place, queries, lambda value: value[:, :2].clone()),
        },
        folder,
    )


@attack(TENSORS)
def missing_and_foreign_tensors(folder: Path) -> Shown:
    """A tensor is not there, has peft's inner name, or stands there besides."""
    key = f"base_model.model.{QUERY}.lora_A.weight"

    def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        return lambda weights: {other: value for other, value in weights.items() if other != name}

    renamed = key.replace(".weight", ".default.weight")
    cases: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
        "factor": (without(key), key),
        "queries": (without("base_model.model.query_tokens"), "query_tokens"),
        "norm": (without("base_model.model.vision_model.post_layernorm.bias"), "post_layernorm.bias"),
        "renamed": (lambda weights: {**without(key)(weights), renamed: weights[key]}, key),
        "besides": (lambda weights: {**weights, renamed: weights[key].clone()}, renamed),
        "unrooted": (lambda weights: {**weights, "query_tokens": torch.zeros(1, 4, 32)}, "'query_tokens'"),
    }
    return _each(
        {
            name: lambda place, change=change, needle=needle: _refused(
                edit_weights(exported(place, "llama", **MADE), change), needle
            )
            for name, (change, needle) in cases.items()
        },
        folder,
    )


# ---- origin


@attack(ORIGIN)
def another_llm(folder: Path) -> Shown:
    """Updates of a T5's layers for a LLaMA, and of a LLaMA's for a T5: each told by layers that are not there."""
    _refused(
        exported(folder / "b", "t5", **BOTH),
        "'language_model.decoder.block.0",
        "this LLM (llama) does not have",
        kind="llama",
        made=BOTH,
    )
    return _refused(
        exported(folder / "c", "llama", **BOTH),
        "'language_model.model.layers.0",
        "this LLM (t5) does not have",
        kind="t5",
        made=BOTH,
    )


@attack(ORIGIN)
def another_base(folder: Path) -> Shown:
    """base_model_name_or_path names another base than the recipe: told, since a name alone does not say what the
    weights are."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    listener, spoken = Listener(), logging.getLogger("vltrain.models.peft.reader")
    spoken.addHandler(listener)
    try:
        _as_stock(
            edit(
                exported(folder / "a", "llama", **MADE),
                base_model_name_or_path="Salesforce/instructblip-vicuna-7b",
                lora_dropout=0.25,
            )
        )
    finally:
        spoken.removeHandler(listener)
    for needle in ("Salesforce/instructblip-vicuna-7b", "dropout 0.0 (was 0.25)"):
        if not any(needle in line for line in lines):
            raise AttackFailed("silent", f"no line with {needle}: {lines}")
    return Shown("told", lines[0])


@attack(ORIGIN)
def another_type(folder: Path) -> Shown:
    """IA3, LoHa, prompts, no type, AdaLoRA for LoRA and the other way round."""
    kinds = ("IA3", "LOHA", "PROMPT_TUNING", "lora", "", None, ...)
    _each(
        {
            f"of {kind}": lambda place, kind=kind: _refused(
                edit(exported(place, "llama", **MADE), peft_type=kind), "peft_type"
            )
            for kind in kinds
        },
        folder,
    )
    _refused(exported(folder / "x", "llama", **MADE), "the type LORA", made=ADALORA)
    return _refused(exported(folder / "y", "llama", **ADALORA), "the type ADALORA")


@attack(ORIGIN)
def adalora_patterns(folder: Path) -> Shown:
    """AdaLoRA's rank_pattern: too short, of numbers, of a layer that is none, of another rank than the file."""
    cases = {
        "short": {f"{QUERY}.lora_E": [True]},
        "numbers": {f"{QUERY}.lora_E": [1, 0, 1, 1]},
        "alien": {"qformer.x.lora_E": [True] * 4},
        "flat": [True] * 4,
        "bare": {QUERY: [True] * 4},
        "other": {f"{QUERY}.lora_E": [True, False, True, True]},
    }
    return _each(
        {
            name: lambda place, given=given: _refused(
                edit(exported(place, "llama", **ADALORA), rank_pattern=given), made=ADALORA
            )
            for name, given in cases.items()
        },
        folder,
    )


@attack(ORIGIN)
def adalora_of_stock_peft(folder: Path) -> Shown:
    """Stock peft's own AdaLoRA, its schedule and rank others than the recipe's."""
    settings = AdaLoraConfig(
        init_r=4,
        target_r=3,
        total_step=10,
        lora_alpha=8,
        target_modules=r"qformer.*\.attention\.attention\.(query|value)",
    )
    made = by_stock_peft(folder / "a", "llama", settings)
    self_alone = {**ADALORA, "qformer__targets": ("self",)}
    _refused(made, "init_rank 4", made={**self_alone, "adalora__init_rank": 6})
    _refused(edit(made, total_step=None), "total_step", made=self_alone)
    return _as_stock(edit(made, total_step=10), made=self_alone)


# ---- exports and evaluation


def _run(folder: Path, **changes: Any) -> Path:
    config = base("llama").recipe(**{**MADE, **changes})
    save_run(folder, config, build_model(config.model))
    return folder


@attack(EXPORTS)
def an_output_that_is_there(folder: Path) -> Shown:
    """--output names a file, a folder with something in it, a link to nothing, the run itself."""
    run = _run(folder / "run")
    (folder / "file").write_text("x")
    (folder / "full").mkdir()
    (folder / "full" / "x").write_text("x")
    (folder / "link").symlink_to(folder / "nowhere")
    for name in ("file", "full", "link", "run"):
        for form in ("peft", "whole"):
            shown = refused(
                ["export", run, "--output", folder / name, "--format", form], "exists already", untouched=folder
            )
    return shown


@attack(EXPORTS)
def a_place_that_cannot_hold_it(folder: Path) -> Shown:
    """--output below a file, a device, /proc."""
    run = _run(folder / "run")
    (folder / "file").write_text("x")
    for place in (folder / "file" / "out", Path("/dev/full/out"), Path("/proc/out")):
        shown = refused(["export", run, "--output", place], str(place), untouched=folder)
    return shown


@attack(EXPORTS)
def what_one_folder_cannot_hold(folder: Path) -> Shown:
    """LoRA in one network and AdaLoRA in the other; two dropouts; nothing by either."""
    cases: dict[str, dict[str, Any]] = {
        "kinds": {"llm__mode": "adalora"},
        "dropouts": {"llm__mode": "lora", "llm__dropout": 0.5},
        "none": {"qformer__mode": "full", "qformer__rank": 8, "qformer__alpha": 8.0},
    }
    return _each(
        {
            name: lambda place, changes=changes: refused(
                ["export", _run(place, **changes), "--output", folder / "out", "--proof", "none"],
                "--format whole",
                untouched=place,
            )
            for name, changes in cases.items()
        },
        folder,
    )


@attack(EXPORTS)
def tokenizers_that_are_gone(folder: Path) -> Shown:
    """--format whole of a run whose tokenizer is no longer there."""
    run = _run(folder / "run", tokenizer=str(folder / "gone"))
    return refused(
        ["export", run, "--output", folder / "out", "--format", "whole", "--proof", "none"], "gone", untouched=folder
    )


@attack(PRECISION)
def fp32_of_eight_bits(folder: Path) -> Shown:
    """eval.precision fp32 where LLM.int8 decides by what is answered together, or where all is fp32 anyway."""
    refused(
        ["train", "--recipe", "quickstart", "--eval.precision", "fp32", "--train.precision", "fp32"],
        "eval.precision: has no effect",
        untouched=folder,
    )
    refused(
        ["train", "--recipe", "quickstart", "--eval.precision", "fp64"],
        "eval.precision",
        "one of train, fp32",
        untouched=folder,
    )
    return refused(
        ["train", "--recipe", "quickstart", "--eval.precision", "fp32", "--bits", "8"],
        "eval.precision",
        "LLM.int8",
        untouched=folder,
    )
