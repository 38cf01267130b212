"""The folder that `vltrain export --format lora` writes of a run of the [cls]-tap model, read back as trained weights
for `train.init_from`.

    llm/adapter_config.json, llm/adapter_model.safetensors    peft's, of the LLM; vision/, of the ViT
    neck.safetensors                                          neck and modality embedding
    vltrain_origin.json                                       which run it is of, and which network its weights belong
                                                              to

Only of a run that has LoRA and no adapters: these are written as low-rank updates of the layers behind them, and what
they were cannot be told from that. (`--format adapters` keeps the weights themselves.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vltrain.errors import InputError
from vltrain.files.digest import sha256_of
from vltrain.files.strict_json import read_object
from vltrain.models.peft.layers import NAME
from vltrain.models.peft.layout import ROOT
from vltrain.train.checkpoints.checkpoint import Checkpoint
from vltrain.train.run.identity import value_at

EXPORTED = "vltrain_origin.json"  # in an exported folder: which weights it was made of
NECK, UPDATES, SETTINGS = "neck.safetensors", "adapter_model.safetensors", "adapter_config.json"
ROOTS = {"llm": "llm.", "vision": "vision.clip."}
"""By the name of a part and of its folder, what the names of its parameters begin with."""
KEY = "train.init_from"


@dataclass(frozen=True, kw_only=True)
class LoraFolder(Checkpoint):
    """Such a folder in a checkpoint's place. `tensors`: fp32, by the names of the run's parameters."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.tensors.items()

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.tensors.items()}


def is_lora_folder(place: Path) -> bool:
    """Whether a folder is one of `vltrain export --format lora`, of the [cls]-tap model."""
    return (place / EXPORTED).is_file() and (place / NECK).is_file() and any((place / part).is_dir() for part in ROOTS)


def open_lora_folder(place: Path) -> LoraFolder:
    """Raises InputError for a folder that is damaged, or of a run with adapters."""
    origin = read_object(place / EXPORTED, "what the folder was made of")
    belongs_to, tuned = origin.get("belongs_to"), origin.get("checkpoint")
    if not isinstance(belongs_to, dict) or not isinstance(tuned, dict) or type(tuned.get("step")) is not int:
        raise InputError(
            f"{KEY}: {place / EXPORTED}: says of no checkpoint which network it belongs to; export the run "
            "anew, --format adapters"
        )
    _require_lora_alone(place, belongs_to)
    if origin.get("dtype", "fp32") != "fp32":
        raise InputError(
            f"{KEY}: {place}: its weights were rounded to {origin['dtype']}; export the run with --dtype fp32, "
            "or --format adapters"
        )
    tensors, files = {}, []
    for part in (part for part in ROOTS if (place / part).is_dir()):
        tensors |= {
            f"{ROOTS[part]}{name.removeprefix(ROOT)}".replace(".weight", f".{NAME}.weight"): value
            for name, value in _read(place / part / UPDATES).items()
        }
        files += [place / part / SETTINGS, place / part / UPDATES]
    tensors |= {
        name if name.startswith("modality_embedding.") else f"neck.{name}": value
        for name, value in _read(place / NECK).items()
    }
    digest = hashlib.sha256("".join(map(sha256_of, (*files, place / NECK))).encode()).hexdigest()
    return LoraFolder(
        path=place, step=tuned["step"], belongs_to=belongs_to, digest=digest, tensors=tensors, is_origin=True
    )


def _require_lora_alone(place: Path, belongs_to: dict[str, Any]) -> None:
    def said(key: str) -> Any:
        return value_at(belongs_to, f"model.{key}")

    adapters = [part for part in ("llm", "vision") if said(f"adapter.{part}") != "none"]
    own = said("tune") != "adapters" or said("vision.train") or said("llm.train")
    if adapters or own or {said(f"{part}.peft.kind") for part in ROOTS} - {None} != {"lora"}:
        what = (
            f"adapters in {' and '.join(adapters)}, which are written as updates of the layers behind them"
            if adapters
            else "more than LoRA"
        )
        raise InputError(
            f"{KEY}: {place}: the run that it is of has {what}; begin with the run itself, or with its export "
            "--format adapters"
        )


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not iterable)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{KEY}: {path}: not a safetensors file that can be read ({error})") from None
