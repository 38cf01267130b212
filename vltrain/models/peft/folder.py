"""An InstructBLIP's tuned parameters as a folder in peft's layout, which `PeftModel.from_pretrained` reads;
`peft_reader` reads it back.

    adapter_config.json          a LoraConfig, or an AdaLoraConfig with its rank pattern; the layers by their whole
                                 names
    adapter_model.safetensors    low-rank factors; what was tuned whole (`modules_to_save`); the query tokens

peft has no place for a parameter that belongs to no module, as transformers' query tokens do. But it loads whatever
name of the model the file holds, so they are simply in it: after `PeftModel.from_pretrained` the model computes what
ours does. They then are the base's, and stay when the adapter is switched off.
"""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from vltrain.config.model.instructblip import InstructBlipConfig, LanguageTuning, QFormerTuning
from vltrain.errors import InputError
from vltrain.models.peft.layout import LOW_RANK, ROOT
from vltrain.models.peft.low_rank import NAME

# A T5's table of embeddings and a LLaMA's, and the names that they have besides; the heads' only where these are no
# weights of their own.
TIED = {
    "language_model.shared.weight": tuple(
        f"language_model.{name}.weight" for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    ),
    "language_model.model.embed_tokens.weight": ("language_model.lm_head.weight",),
}


def peft_key(name: str) -> str:
    """The name in peft's file of a parameter, by its name in transformers' InstructBLIP with our layers in it."""
    return ROOT + name.replace(f".{NAME}", "")


def layer_of(name: str) -> str | None:
    """The linear layer that a low-rank factor of that name updates; None for other parameters."""
    layer, found, _ = name.partition(".lora_")
    return layer if found else None


def only_mode(blip: InstructBlipConfig) -> str:
    """lora or adalora, the one that the recipe uses. Raises InputError if it uses both or none: a folder of peft's
    holds one kind."""
    modes = {tuning.mode for tuning in _tuned(blip)}
    if len(modes) != 1:
        found = " and ".join(sorted(modes)) or f"{blip.qformer.mode} Q-Former, {blip.llm.mode} LLM"
        raise InputError(
            f"a peft folder holds LoRA or AdaLoRA, found {found}; export the whole model instead (--format whole)"
        )
    return modes.pop()


def _tuned(blip: InstructBlipConfig) -> list[QFormerTuning | LanguageTuning]:
    return [tuning for tuning in (blip.qformer, blip.llm) if tuning.mode in LOW_RANK]


def describe_updates(blip: InstructBlipConfig, weights: dict[str, Tensor], base: str | None) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
        weights: by name in transformers' model; AdaLoRA's are cut down to the directions that are kept, see
            `kept_directions`.

    Raises: InputError for what one such file cannot say.
    """
    from peft import AdaLoraConfig, LoraConfig

    mode, tuned = only_mode(blip), _tuned(blip)
    layers = sorted({layer for name in weights if (layer := layer_of(name)) is not None})
    first = tuned[0]
    if len({tuning.dropout for tuning in tuned}) > 1 or (
        mode == "adalora" and len({tuning.alpha for tuning in tuned}) > 1
    ):
        raise InputError(
            "peft knows one dropout for all layers, and one alpha for those of AdaLoRA; export the whole model "
            "instead (--format whole)"
        )
    modes = {"vision_model": blip.vision, "qformer": blip.qformer.mode, "language_model": blip.llm.mode}
    saved = [name for name, how in modes.items() if how == "full"]
    common = {
        "base_model_name_or_path": base,
        "target_modules": layers,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "inference_mode": True,
        "modules_to_save": sorted(
            {*saved, "language_projection", *(() if "vision_model" in saved else ("vision_model.post_layernorm",))}
        ),
    }
    if mode == "lora":
        others = [layer for layer in layers if _tuning_of(layer, blip) is not first]
        patterns = {
            "rank_pattern": {layer: blip.llm.rank for layer in others if blip.llm.rank != first.rank},
            "alpha_pattern": {layer: blip.llm.alpha for layer in others if blip.llm.alpha != first.alpha},
        }
        return plain_settings(LoraConfig(r=first.rank, **common, **patterns).to_dict())
    schedule = blip.adalora
    settings = AdaLoraConfig(
        init_r=schedule.init_rank,
        target_r=schedule.target_rank,
        tinit=schedule.tinit,
        tfinal=schedule.tfinal,
        deltaT=schedule.delta_t,
        beta1=schedule.beta1,
        beta2=schedule.beta2,
        orth_reg_weight=schedule.orth_reg_weight,
        total_step=schedule.tinit + schedule.tfinal + 1,
        **common,
    )
    return plain_settings(settings.to_dict())


def _tuning_of(layer: str, blip: InstructBlipConfig) -> QFormerTuning | LanguageTuning:
    return blip.qformer if layer.startswith("qformer.") else blip.llm


def plain_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """As JSON holds it: sets are lists, enumerations words."""
    return json.loads(
        json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )


def with_tied_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, and an LLM's embeddings that are tuned with it under all of their names: peft asks for each name of
    a module that was saved."""
    named = dict(weights)
    for table, others in TIED.items():
        for name in others if table in weights else ():
            named.setdefault(name, weights[table].clone())
    return named


def kept_directions(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """AdaLoRA's layers, by name, and which of their directions (bool [r]) are not switched off by an entry of E that is
    zero."""
    return {
        name.partition(".lora_E.")[0]: values.flatten() != 0 for name, values in weights.items() if ".lora_E." in name
    }


def cut_to_kept(weights: dict[str, Tensor], kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with AdaLoRA's factors cut down to the directions in `kept`, as peft's files have them."""
    cut = dict(weights)
    for layer, mask in kept.items():
        for factor in ("lora_A", "lora_E"):
            cut[f"{layer}.{factor}.{NAME}"] = weights[f"{layer}.{factor}.{NAME}"][mask]
        cut[f"{layer}.lora_B.{NAME}"] = weights[f"{layer}.lora_B.{NAME}"][:, mask].contiguous()
    return cut
