"""Starts a recipe's tuned parameters from a peft folder, so that the model computes what `PeftModel.from_pretrained` of
that folder computes.

What peft would do with its settings is compared with what the recipe does, layer by layer, before any weight is read
(`vltrain.models.peft.layout`);
whatever a recipe can't say is refused. Files hold exactly what both ask for, in floats, finite, of the right shapes.
Dropout and AdaLoRA's schedule are of the training that goes on and are the recipe's; the log says where the folder's
were others, and which base it names.

Query tokens, projection and the norm behind the ViT are tuned by every recipe here, and in every folder that
`vltrain export` writes. A folder of peft's own without any of the three leaves them as the base has them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import InstructBlipConfig as Sizes

from vltrain.config.model.instructblip import InstructBlipConfig
from vltrain.errors import InputError
from vltrain.models.peft.folder import layer_of, peft_key
from vltrain.models.peft.layout import (
    LOW_RANK,
    RECIPE_ROOTS,
    ROOT,
    empty_network,
    is_bridge,
    recipe_whole,
    require_known_layers,
    require_same_layers,
    stock_layout,
)
from vltrain.models.peft.low_rank import NAME
from vltrain.models.peft.settings import CONFIG, read_settings
from vltrain.models.pretrained.tensor_files import open_tensors

logger = logging.getLogger(__name__)

WEIGHTS, TORCH_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
KEY = "model.instructblip.adapters"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# AdaLoRA's, of training alone: name in a recipe, name in peft's file.
SCHEDULE = {name: name for name in ("tinit", "tfinal", "beta1", "beta2", "orth_reg_weight")} | {
    "target_rank": "target_r",
    "delta_t": "deltaT",
}


def peft_files(place: str) -> dict[str, Path]:
    """The files that are read of such a folder, by name. Raises InputError as `PeftFolder`, as far as its tensors
    go."""
    weights, *_ = _open(Path(place))
    return {path.name: path for path in (Path(place) / CONFIG, weights)}


class PeftFolder:
    """Reads a folder into a model of ours, module by module.

    Args:
        place: the folder.
        sizes: of the network that it goes into.

    Raises: InputError for a folder that is none or damaged, and for one that means something else than the recipe.
    """

    def __init__(self, place: str, blip: InstructBlipConfig, sizes: Sizes) -> None:
        self._folder = Path(place)
        if not self._folder.is_dir():
            raise InputError(
                f"{KEY}: {place} is not a peft folder: it does not exist, or is not a folder; expected one with "
                f"{CONFIG} and {WEIGHTS}"
            )
        settings = read_settings(KEY, self._folder)
        network = empty_network(sizes)
        _require_one_mode(place, settings, blip)
        where = f"{KEY}: {self._folder / CONFIG}"
        self._file, self._shapes, self._read = _open(self._folder)
        updated = {key.removeprefix(ROOT).partition(".lora_")[0] for key in self._shapes if ".lora_" in key}
        require_known_layers(updated, network, f"{KEY}: {self._file}")
        self._stock = stock_layout(settings, sizes, where)
        require_same_layers(self._stock.layers, blip, network, where)
        self._masks = _masks(settings, self._stock.layers, where)
        self._whole = recipe_whole(blip, network)
        self._leaves_bridge = not any(
            is_bridge(name) for name in (*self._stock.whole, *(key.removeprefix(ROOT) for key in self._shapes))
        )
        self._require_whole()
        self._left = set(self._shapes)
        self._tell(settings, blip)

    def _require_whole(self) -> None:
        """The file holds what peft expects of it, and what the recipe tunes: no more, no less, in the right shapes."""
        file = self._file
        for key, shape in self._stock.shapes.items():
            if key not in self._shapes:
                raise InputError(
                    f"{KEY}: {file} lacks '{key}', which its own {CONFIG} promises: cut off, or written for "
                    "another base"
                )
            self._require_shape(key, self._cut(key, shape))
        # peft loads whatever parameter's name the file holds, named in the settings or not.
        for key in self._shapes.keys() - self._stock.shapes.keys():
            if key.removeprefix(ROOT) not in self._whole or not key.startswith(ROOT):
                raise InputError(f"{KEY}: {file} holds '{key}', which this recipe does not tune")
            self._require_shape(key, self._whole[key.removeprefix(ROOT)])
        alien = sorted(self._stock.whole - self._whole.keys())
        if alien:
            raise InputError(
                f"{KEY}: {file} holds '{alien[0]}' whole (modules_to_save), which this recipe does not tune; "
                "set its network's mode to full"
            )
        held = {*self._stock.whole, *(key.removeprefix(ROOT) for key in self._shapes)}
        for name in sorted(self._whole.keys() - held):
            if not (self._leaves_bridge and is_bridge(name)):
                raise InputError(
                    f"{KEY}: {file} lacks '{ROOT}{name}', which this recipe tunes: made with other modes, or "
                    "for another base"
                )

    def _require_shape(self, key: str, due: tuple[int, ...]) -> None:
        if self._shapes[key] != due:
            found = f"'{key}' in {self._file} has the shape {self._shapes[key]}, here {due} is due"
            raise InputError(f"{KEY}: {found}: it was made for another base, or with another rank")

    def _cut(self, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A factor's shape after AdaLoRA's pruning."""
        layer, found, factor = key.removeprefix(ROOT).partition(".lora_")
        mask = self._masks.get(layer) if found else None
        if mask is None:
            return shape
        kept = int(mask.sum())
        return (shape[0], kept) if factor == "B" else (kept, *shape[1:])

    def _tell(self, settings: dict[str, Any], blip: InstructBlipConfig) -> None:
        made_for, source = settings["base_model_name_or_path"], blip.source
        if made_for != source:
            told = "%s names %s as its base, this recipe's is %s: the same function only if these are the same weights"
            logger.warning(told, self._folder, made_for or "none", source or "random weights")
        tuned = [tuning for tuning in (blip.qformer, blip.llm) if tuning.mode in LOW_RANK]
        others = [
            ("dropout", settings["lora_dropout"], tuning.dropout)
            for tuning in tuned
            if tuning.dropout != settings["lora_dropout"]
        ]
        if settings["peft_type"] == "ADALORA":
            others += [
                (ours, settings[theirs], getattr(blip.adalora, ours))
                for ours, theirs in SCHEDULE.items()
                if settings[theirs] != getattr(blip.adalora, ours)
            ]
        if others:
            found = ", ".join(f"{name} {value} (was {before})" for name, before, value in others)
            logger.warning("%s: its training goes on with this recipe's %s", self._folder, found)
        if self._leaves_bridge:
            logger.warning(
                "%s holds neither query tokens nor projection nor the ViT's last norm: they start as the base has them",
                self._folder,
            )

    @torch.no_grad()
    def fill(self, name: str, unit: nn.Module) -> None:
        """Copies what the folder has of the trained parameters of a unit, which is called `name` in transformers'
        model."""
        for inner, parameter in unit.named_parameters():
            if parameter.requires_grad:
                self.fill_one(f"{name}.{inner}", parameter)

    @torch.no_grad()
    def fill_one(self, name: str, parameter: nn.Parameter) -> None:
        """The same for one parameter, by its whole name."""
        if self._leaves_bridge and is_bridge(name):
            return
        key = peft_key(name)
        if self._stock.owners.get(key, name) != name:  # a tied weight, filled with its first name
            return
        keys = [
            key,
            *(
                other
                for other, owner in self._stock.owners.items()
                if owner == name and other != key and other in self._left
            ),
        ]
        value = self._take(keys[0])
        for other in keys[1:]:
            if not torch.equal(self._take(other), value):
                raise InputError(
                    f"{KEY}: '{key}' and '{other}' in {self._file} are one weight in this network, but differ"
                )
        mask = self._masks.get(layer_of(name) or "")
        parameter.copy_(value if mask is None else _spread(value, mask, parameter, name))

    def _take(self, key: str) -> Tensor:
        assert key in self._left, f"'{key}' is asked for twice, or was not checked"
        self._left.discard(key)
        value = self._read(key)
        if not torch.isfinite(value).all():
            raise InputError(
                f"{KEY}: '{key}' in {self._file} has numbers that are NaN or Inf: its training diverged, or the "
                "file is damaged"
            )
        return value

    def finish(self) -> None:
        """After the last parameter: everything that the folder holds was asked for."""
        left = {key for key in self._left if key in self._stock.owners or key not in self._stock.shapes}
        assert not left, f"checked, but not read: {sorted(left)[:3]}"


def _require_one_mode(place: str, settings: dict[str, Any], blip: InstructBlipConfig) -> None:
    modes = {short: getattr(blip, short).mode for short in RECIPE_ROOTS.values()}
    low = {mode for mode in modes.values() if mode in LOW_RANK}
    told = " and ".join(f"{short}.mode {mode}" for short, mode in modes.items())
    if len(low) != 1:
        raise InputError(
            f"{KEY}: a peft folder holds LoRA or AdaLoRA, this recipe has model.instructblip.{told}; set "
            f"what {place} was made with"
        )
    if settings["peft_type"] != LOW_RANK[mode := low.pop()]:
        raise InputError(
            f"{KEY}: {place} holds updates of the type {settings['peft_type']}, this recipe tunes by {mode}; "
            "set the mode that it was made with"
        )


def _masks(settings: dict[str, Any], layers: dict[str, Any], where: str) -> dict[str, Tensor]:
    """AdaLoRA's layers, and which of their directions (bool [r]) the folder holds; empty before the first pruning."""
    pattern = settings["rank_pattern"] if settings["peft_type"] == "ADALORA" else None
    masks = {}
    for name, mask in (pattern or {}).items():
        layer, found, rest = name.partition(".lora_E")
        if layer not in layers or not found or rest not in ("", f".{NAME}"):
            raise InputError(f"{where}: rank_pattern: found '{name}', expected LAYER.lora_E of a layer that it updates")
        if len(mask) != layers[layer].rank:
            raise InputError(
                f"{where}: rank_pattern: '{name}' tells of {len(mask)} directions, init_r says {layers[layer].rank}"
            )
        masks[layer] = torch.tensor(mask, dtype=torch.bool)
    return masks


def _open(folder: Path) -> tuple[Path, dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """(the file with the weights, its tensors' shapes, what reads one of them). Raises InputError for one that is not
    whole, or holds no floats."""
    safe, torch_file = folder / WEIGHTS, folder / TORCH_WEIGHTS
    if safe.exists() and torch_file.exists():
        raise InputError(f"{KEY}: {folder} holds {WEIGHTS} and {TORCH_WEIGHTS}: one of them is stale; remove it")
    if not safe.exists() and not torch_file.exists():
        raise InputError(f"{KEY}: {folder} is not a peft folder: it holds neither {WEIGHTS} nor {TORCH_WEIGHTS}")
    if safe.exists():
        try:
            opened = safe_open(safe, framework="pt")
            heads = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not iterable)
            kinds = {name: head.get_dtype() for name, head in heads.items()}
            shapes = {name: tuple(head.get_shape()) for name, head in heads.items()}
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(
                f"{KEY}: {safe}: not a whole safetensors file ({str(error).splitlines()[0]}). Fetch it again"
            ) from None
        odd = {name: kind for name, kind in kinds.items() if kind not in FLOATS}
        file, read = safe, opened.get_tensor
    else:
        try:
            tensors = open_tensors(KEY, torch_file)
        except InputError as error:
            raise InputError(f"{KEY}: {str(error).removeprefix(f'{KEY}.source: ')}") from None
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        odd = {
            name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items() if not _is_plain(tensor)
        }
        file, read = torch_file, tensors.__getitem__
    if odd:
        name = min(odd)
        raise InputError(f"{KEY}: '{name}' in {file} is of the type {odd[name]}, expected floats of 16, 32 or 64 bits")
    return file, shapes, read


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype in FLOATS.values() and tensor.layout == torch.strided and tensor.device.type == "cpu"


def _spread(value: Tensor, mask: Tensor, parameter: Tensor, name: str) -> Tensor:
    """A pruned factor with its kept directions in their places: beside them entries of E are zero, rows and columns as
    they were drawn."""
    whole = torch.zeros_like(parameter) if ".lora_E." in name else parameter.detach().clone()
    if ".lora_B." in name:
        whole[:, mask] = value.to(whole.dtype)
    else:
        whole[mask] = value.to(whole.dtype)
    return whole
