"""Folders of adapters whose settings, or files, are not what is expected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file

from tests.attacks.adapters import ALIEN, BROKEN, CHANGED, MADE, _as_stock, _each, _refused
from tests.attacks.attack import Shown, attack
from tests.support.peft_folders import (
    CONFIG,
    WEIGHTS,
    by_stock_peft,
    edit,
    exported,
)

# ---- changed bases and other settings


@attack(CHANGED)
def initialisations_that_change_the_base(folder: Path) -> Shown:
    """PiSSA and its like take from the base what the factors start with; taken up on the plain base it would be there
    twice."""
    kinds = ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "mica", "OLoRA", "of_tomorrow", None, 1)
    return _each(
        {
            str(kind): lambda place, kind=kind: _refused(
                edit(exported(place, "llama", **MADE), init_lora_weights=kind), "init_lora_weights"
            )
            for kind in kinds
        },
        folder,
    )


@attack(CHANGED)
def initialisations_that_do_not(folder: Path) -> Shown:
    """Gaussian, orthogonal, random and EVA's factors: the base is as it was, and all that counts is in the file."""
    kinds = ("gaussian", "orthogonal", False, "eva")
    return _each(
        {
            str(kind): lambda place, kind=kind: _as_stock(
                edit(exported(place, "llama", **MADE), init_lora_weights=kind)
            )
            for kind in kinds
        },
        folder,
    )


@attack(ALIEN)
def dora(folder: Path) -> Shown:
    """use_dora, with its magnitudes in the file."""
    return _refused(
        by_stock_peft(
            folder / "a",
            "llama",
            LoraConfig(r=4, lora_alpha=16, use_dora=True, target_modules=r"qformer\..*\.(query|value)"),
        ),
        "use_dora: found true",
    )


@attack(ALIEN)
def biases(folder: Path) -> Shown:
    """lora_bias, and bias all or lora_only: biases are trained besides."""
    cases = {
        "b": {"lora_bias": True},
        "all": {"bias": "all"},
        "only": {"bias": "lora_only"},
        "odd": {"bias": "some"},
        "null": {"lora_bias": 1},
    }
    return _each(
        {
            name: lambda place, given=given: _refused(
                edit(exported(place, "llama", **MADE), **given), f"{next(iter(given))}: found", "not reproduced"
            )
            for name, given in cases.items()
        },
        folder,
    )


@attack(ALIEN)
def fan_in_fan_out(folder: Path) -> Shown:
    """fan_in_fan_out, which peft takes back for linear layers."""
    return _as_stock(edit(exported(folder / "a", "llama", **MADE), fan_in_fan_out=True))


@attack(ALIEN)
def further_methods(folder: Path) -> Shown:
    """What peft can do besides: each is refused by its name."""
    cases = {
        "layer_replication": [[0, 2], [1, 2]],
        "trainable_token_indices": [1, 2],
        "target_parameters": ["a.weight"],
        "alora_invocation_tokens": [5],
        "use_qalora": True,
        "arrow_config": {"top_k": 2},
        "megatron_config": {"x": 1},
        "loftq_config": {"loftq_bits": 4},
        "corda_config": {"x": 1},
        "runtime_config": {"ephemeral_gpu_offload": True},
        "ensure_weight_tying": True,
        "velora_config": {"num_groups": 2},
        "kasa_config": {"x": 1},
    }
    return _each(
        {
            name: lambda place, name=name, value=value: _refused(
                edit(exported(place, "llama", **MADE), **{name: value}), name
            )
            for name, value in cases.items()
        },
        folder,
    )


@attack(ALIEN)
def settings_of_tomorrow(folder: Path) -> Shown:
    """Keys that the installed peft does not know: refused, unless they are switched off."""
    made = edit(
        exported(folder / "a", "llama", **MADE),
        use_of_tomorrow=False,
        tomorrow_config=None,
        runtime_config={"ephemeral_gpu_offload": False},
    )
    _as_stock(made)
    return _refused(edit(made, use_of_tomorrow=True), "use_of_tomorrow: found true", "does not know")


@attack(ALIEN)
def settings_of_a_wrong_type(folder: Path) -> Shown:
    """Numbers that are texts, whole numbers that are none, NaN."""
    cases = {
        "r": ("4", 4.0, 0, True, -1, None),
        "lora_alpha": ("16", None, float("nan"), float("inf"), [16], True),
        "lora_dropout": (1, -0.1, "0"),
        "rank_pattern": ([4], {"query": "4"}, {"query": 0}, {"": 4}),
        "alpha_pattern": ({"query": None}, {"query": float("nan")}, "query"),
        "modules_to_save": ("qformer", [1], {"a": 1}),
        "use_rslora": (1, "false", None),
        "layers_to_transform": ("0", [0.5], [-1]),
        "peft_type": (1, ["LORA"]),
    }
    flat = {f"{name}{number}": (name, value) for name, values in cases.items() for number, value in enumerate(values)}
    return _each(
        {
            label: lambda place, name=name, value=value: _refused(
                edit(exported(place, "llama", **MADE), **{name: value})
            )
            for label, (name, value) in flat.items()
        },
        folder,
    )


# ---- broken folders


@attack(BROKEN)
def spoilt_settings(folder: Path) -> Shown:
    """adapter_config.json cut off, a list, twice a key, in another encoding, a folder, empty, not there."""

    def spoil(change: Callable[[Path], Any]) -> Callable[[Path], Shown]:
        def case(place: Path) -> Shown:
            change(exported(place, "llama", **MADE) / CONFIG)
            return _refused(place, CONFIG)

        return case

    return _each(
        {
            "cut": spoil(lambda path: path.write_text(path.read_text()[:-20])),
            "list": spoil(lambda path: path.write_text("[1]")),
            "twice": spoil(lambda path: path.write_text(path.read_text().replace('"r": 4', '"r": 4, "r": 8'))),
            "utf16": spoil(lambda path: path.write_text(path.read_text(), encoding="utf-16")),
            "empty": spoil(lambda path: path.write_text("")),
            "folder": spoil(lambda path: (path.unlink(), path.mkdir())),
            "none": spoil(Path.unlink),
            "deep": spoil(lambda path: path.write_text("[" * 100000)),
        },
        folder,
    )


@attack(BROKEN)
def spoilt_weights(folder: Path) -> Shown:
    """adapter_model.safetensors cut off, empty, a folder, something else, not there."""

    def spoil(change: Callable[[Path], Any], *needles: str) -> Callable[[Path], Shown]:
        def case(place: Path) -> Shown:
            change(exported(place, "llama", **MADE) / WEIGHTS)
            return _refused(place, *needles)

        return case

    whole = "not a whole safetensors file"
    return _each(
        {
            "cut": spoil(lambda path: path.write_bytes(path.read_bytes()[:-100]), whole),
            "empty": spoil(lambda path: path.write_bytes(b""), whole),
            "head": spoil(lambda path: path.write_bytes(b"\xff" * 64), whole),
            "folder": spoil(lambda path: (path.unlink(), path.mkdir()), whole),
            "none": spoil(Path.unlink, "neither"),
        },
        folder,
    )


@attack(BROKEN)
def a_torch_file(folder: Path) -> Shown:
    """adapter_model.bin in its stead is read as peft reads it; beside it, one of both is stale; cut off, or a program,
    it is refused."""
    made = exported(folder / "a", "llama", **MADE)
    weights = load_file(made / WEIGHTS)
    torch.save(weights, made / "adapter_model.bin")
    _refused(made, "one of them is stale")
    (made / WEIGHTS).unlink()
    _as_stock(made)
    content = (made / "adapter_model.bin").read_bytes()
    (made / "adapter_model.bin").write_bytes(content[:-200])
    _refused(made, "adapter_model.bin")
    torch.save({**weights, "x": Path}, made / "adapter_model.bin")
    return _refused(made, "not a plain state dict")


@attack(BROKEN)
def no_folder(folder: Path) -> Shown:
    """A name that is nothing, a file, or a folder of something else."""
    (folder / "file").write_text("x")
    (folder / "other").mkdir()
    return _each(
        {name: lambda place: _refused(place, "not a peft folder") for name in ("nothing", "file", "other")}, folder
    )
