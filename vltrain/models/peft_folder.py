"""An InstructBLIP's tuned parameters as a folder in peft's layout, which `PeftModel.from_pretrained` reads, and back.

    adapter_config.json          a LoraConfig, or an AdaLoraConfig with its rank pattern; the layers by their whole names
    adapter_model.safetensors    low-rank factors; what was tuned whole (`modules_to_save`); the query tokens

peft has no place for a parameter that belongs to no module, as transformers' query tokens do. But it loads whatever name of the model the file
holds, so they are simply in it: after `PeftModel.from_pretrained` the model computes what ours does. They then are the base's, and stay when the
adapter is switched off.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vltrain.errors import InputError
from vltrain.instructblip_config import InstructBlipConfig, LanguageTuning, QFormerTuning
from vltrain.models.low_rank import NAME

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LOW_RANK = {"lora": "LORA", "adalora": "ADALORA"}
ROOT = "base_model.model."
KEY = "model.instructblip.adapters"


def peft_key(name: str) -> str:
    """The name in peft's file of a parameter, by its name in transformers' InstructBLIP with our layers in it."""
    return ROOT + name.replace(f".{NAME}", "")


def layer_of(name: str) -> str | None:
    """The linear layer that a low-rank factor of that name updates; None for other parameters."""
    layer, found, _ = name.partition(".lora_")
    return layer if found else None


def only_mode(blip: InstructBlipConfig) -> str:
    """lora or adalora, the one that the recipe uses. Raises InputError if it uses both or none: a folder of peft's holds one kind."""
    modes = {tuning.mode for tuning in _tuned(blip)}
    if len(modes) != 1:
        found = " and ".join(sorted(modes)) or f"{blip.qformer.mode} Q-Former, {blip.llm.mode} LLM"
        raise InputError(f"a folder of peft's holds LoRA or AdaLoRA, found {found}; export the whole model instead (--format whole)")
    return modes.pop()


def _tuned(blip: InstructBlipConfig) -> list[QFormerTuning | LanguageTuning]:
    return [tuning for tuning in (blip.qformer, blip.llm) if tuning.mode in LOW_RANK]


def describe_updates(blip: InstructBlipConfig, weights: dict[str, Tensor], base: str | None) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
        weights: by name in transformers' model; AdaLoRA's are cut down to the directions that are kept, see `kept_directions`.

    Raises: InputError for what one such file cannot say.
    """
    from peft import AdaLoraConfig, LoraConfig

    mode, tuned = only_mode(blip), _tuned(blip)
    layers = sorted({layer for name in weights if (layer := layer_of(name)) is not None})
    first = tuned[0]
    if len({tuning.dropout for tuning in tuned}) > 1 or (mode == "adalora" and len({tuning.alpha for tuning in tuned}) > 1):
        raise InputError("peft knows one dropout for all layers, and one alpha for those of AdaLoRA; export the whole model instead (--format whole)")
    modes = {"vision_model": blip.vision, "qformer": blip.qformer.mode, "language_model": blip.llm.mode}
    saved = [name for name, how in modes.items() if how == "full"]
    common = {
        "base_model_name_or_path": base, "target_modules": layers, "lora_alpha": first.alpha, "lora_dropout": first.dropout, "inference_mode": True,
        "modules_to_save": sorted({*saved, "language_projection", *(() if "vision_model" in saved else ("vision_model.post_layernorm",))}),
    }  # fmt: skip
    if mode == "lora":
        others = [layer for layer in layers if _tuning_of(layer, blip) is not first]
        patterns = {
            "rank_pattern": {layer: blip.llm.rank for layer in others if blip.llm.rank != first.rank},
            "alpha_pattern": {layer: blip.llm.alpha for layer in others if blip.llm.alpha != first.alpha},
        }
        return _plain(LoraConfig(r=first.rank, **common, **patterns).to_dict())
    schedule = blip.adalora
    settings = AdaLoraConfig(
        init_r=schedule.init_rank, target_r=schedule.target_rank, tinit=schedule.tinit, tfinal=schedule.tfinal, deltaT=schedule.delta_t,
        beta1=schedule.beta1, beta2=schedule.beta2, orth_reg_weight=schedule.orth_reg_weight,
        total_step=schedule.tinit + schedule.tfinal + 1, **common,
    )  # fmt: skip
    return _plain(settings.to_dict())


def _tuning_of(layer: str, blip: InstructBlipConfig) -> QFormerTuning | LanguageTuning:
    return blip.qformer if layer.startswith("qformer.") else blip.llm


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As JSON holds it: sets are lists, enumerations words."""
    return json.loads(json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))


def kept_directions(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """AdaLoRA's layers, by name, and which of their directions (bool [r]) are not switched off by an entry of E that is zero."""
    return {name.partition(".lora_E.")[0]: values.flatten() != 0 for name, values in weights.items() if ".lora_E." in name}


def cut_to_kept(weights: dict[str, Tensor], kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with AdaLoRA's factors cut down to the directions in `kept`, as peft's files have them."""
    cut = dict(weights)
    for layer, mask in kept.items():
        for factor in ("lora_A", "lora_E"):
            cut[f"{layer}.{factor}.{NAME}"] = weights[f"{layer}.{factor}.{NAME}"][mask]
        cut[f"{layer}.lora_B.{NAME}"] = weights[f"{layer}.lora_B.{NAME}"][:, mask].contiguous()
    return cut


class PeftFolder:
    """Reads such a folder into a model of ours, module by module.

    Raises: InputError for a folder that is none, or made with other settings than the recipe's.
    """

    def __init__(self, place: str, blip: InstructBlipConfig) -> None:
        self._folder = Path(place)
        try:
            self._config = json.loads((self._folder / CONFIG).read_text(encoding="utf-8"))
            self._file = safe_open(self._folder / WEIGHTS, framework="pt")
            found = self._config["peft_type"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(f"{KEY}: {place} is no folder of peft's with {CONFIG} and {WEIGHTS} ({type(error).__name__}: {error})") from None
        mode = only_mode(blip)
        if found != LOW_RANK[mode]:
            raise InputError(f"{KEY}: {place} holds updates of the type {found}, this recipe tunes by {mode}; set the mode that it was made with")
        ranks = (self._config.get("init_r"), blip.adalora.init_rank) if mode == "adalora" else (self._config.get("r"), _tuned(blip)[0].rank)
        if ranks[0] != ranks[1] or self._config.get("lora_alpha") != _tuned(blip)[0].alpha:
            told = f"rank {ranks[0]} and alpha {self._config.get('lora_alpha')}, the recipe has {ranks[1]} and {_tuned(blip)[0].alpha}"
            raise InputError(f"{KEY}: {place} was made with {told}")
        self._unread = set(self._file.keys())
        self._pattern: dict[str, list[bool]] = self._config.get("rank_pattern") or {}

    @torch.no_grad()
    def fill(self, name: str, unit: nn.Module) -> None:
        """Copies what the folder has of the trained parameters of a unit, which is called `name` in transformers' model."""
        for inner, parameter in unit.named_parameters():
            if parameter.requires_grad:
                self.fill_one(f"{name}.{inner}", parameter)

    @torch.no_grad()
    def fill_one(self, name: str, parameter: nn.Parameter) -> None:
        """The same for one parameter, by its whole name."""
        key = peft_key(name)
        if key not in self._unread:
            raise InputError(f"{KEY}: {self._folder / WEIGHTS} lacks '{key}', which this recipe tunes: made with other targets, or for another base")
        value = self._file.get_tensor(key)
        self._unread.discard(key)
        mask = self._pattern.get(f"{layer_of(name)}.lora_E")
        if mask is not None:
            is_second = ".lora_B." in name
            if len(mask) == parameter.shape[1 if is_second else 0]:
                value = _spread(value, torch.tensor(mask), parameter, is_second, is_entry=".lora_E." in name)
        if value is None or value.shape != parameter.shape:
            found = "another rank" if value is None else f"the shape {tuple(value.shape)}"
            due = f"here {tuple(parameter.shape)} is due: it was made for another base"
            raise InputError(f"{KEY}: '{key}' in {self._folder / WEIGHTS} has {found}, {due}")
        parameter.copy_(value)

    def finish(self) -> None:
        """Raises InputError if the folder holds anything that was not asked for."""
        if self._unread:
            more = f"(and {len(self._unread) - 1} more)"
            raise InputError(f"{KEY}: {self._folder / WEIGHTS} holds '{min(self._unread)}', which this recipe does not tune {more}")


def _spread(value: Tensor, mask: Tensor, parameter: Tensor, is_second: bool, *, is_entry: bool) -> Tensor | None:
    """A factor with its kept directions in their places: beside them entries of E are zero, rows and columns as they were drawn."""
    if value.shape[1 if is_second else 0] != int(mask.sum()):
        return None
    whole = torch.zeros_like(parameter) if is_entry else parameter.detach().clone()
    if is_second:
        whole[:, mask] = value.to(whole.dtype)
    else:
        whole[mask] = value.to(whole.dtype)
    return whole
