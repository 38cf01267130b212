"""From `model.instructblip` to an InstructBLIP whose trained parameters are exactly those the recipe means.

As `vltrain.models.build`, whose rules hold here: trained parameters are fp32, frozen ones have the dtype asked for,
each unit is loaded, quantised, wrapped and placed before the next one has weights, and the trainable set is asserted.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from transformers import InstructBlipConfig, LlamaForCausalLM

from vltrain.config.model.instructblip import BlipModelConfig
from vltrain.config.model.instructblip import InstructBlipConfig as InstructBlipSettings
from vltrain.errors import InputError
from vltrain.files.locate import locate
from vltrain.models.backbones.llm import checkpoint_blocks
from vltrain.models.instructblip.model import InstructBlip
from vltrain.models.instructblip.weights import KEY, blip_config, blip_units, empty_blip, open_blip, tie_embeddings
from vltrain.models.interface import Place
from vltrain.models.materialise import Weights, assert_materialised
from vltrain.models.peft.low_rank import TARGETS, insert_low_rank, is_low_rank
from vltrain.models.peft.reader import PeftFolder, peft_files
from vltrain.models.pretrained.preprocessor import BLIP_KINDS, Preprocessing, read_preprocessing
from vltrain.models.quantise import QUANTISED_BITS, quantise_linears
from vltrain.ops.attention_choice import choose_attention
from vltrain.ops.liger import choose_kernels, install_liger
from vltrain.ops.loss import LossHead
from vltrain.schema import SQUARE

ALWAYS_TRAINED = {"bridge", "peft"}


@torch.no_grad()
def build_blip(
    model: BlipModelConfig,
    *,
    dtype: torch.dtype,
    activation_checkpointing: bool,
    device: torch.device | str,
    runs_on: torch.device | str,
    place: Place,
) -> InstructBlip:
    """The InstructBLIP of a recipe, in training mode. Arguments and errors: those of
    `vltrain.models.build.build_model`."""
    on_meta = torch.device(device).type == "meta"
    with torch.device("meta") if on_meta else nullcontext():
        config = blip_config(model.instructblip.source, model.instructblip.config, model.instructblip.dropout)
        network = empty_blip(config, _attention(model.instructblip.attention, config, runs_on, dtype, log=not on_meta))
        weights = None if on_meta else open_blip(model.instructblip.source, network, model.seed)
        _finish(network, model, weights, dtype, place)
        llm = network.language_model
        llm.lm_head = LossHead.take_over(llm.lm_head)
        built = InstructBlip(network, _preprocessing(model.instructblip, config.vision_config.image_size))
        if _wants_liger(model, llm, runs_on, log=not on_meta):
            install_liger(llm)
            built.kernels = "liger"
        for part in (built.qformer, built.llm, built.vision) if activation_checkpointing else ():
            checkpoint_blocks(part, {"use_reentrant": False})
    _assert_trainable(built, model)
    if on_meta:
        return built.train()
    assert_materialised(built)
    if place is not None:
        place(built.queries)
        place(built.projection)
        return built.train()
    return built.to(device).train()


def _preprocessing(blip: InstructBlipSettings, image_size: int) -> Preprocessing:
    if blip.source is None or blip.preprocessing == "square":
        return Preprocessing()
    found = read_preprocessing(KEY, blip.source, locate(blip.source), image_size, BLIP_KINDS)
    if found.framing != SQUARE:
        raise InputError(
            f"{KEY}.source: {blip.source}: its preprocessor asks for {found.framing}, expected a bicubic resize "
            "straight to the square"
        )
    return found


def _attention(
    requested: str, config: InstructBlipConfig, runs_on: torch.device | str, dtype: torch.dtype, *, log: bool
) -> str:
    """`choose_attention` of a LLaMA; a T5 leaves nothing to choose but transformers' own two. Raises InputError."""
    if config.text_config.model_type == "llama":
        return choose_attention(requested, config.text_config, runs_on, dtype, f"{KEY}.attention", log=log)
    if requested not in ("auto", "eager", "sdpa"):
        raise InputError(
            f"{KEY}.attention: found '{requested}', but that is a LLaMA's, and this LLM is a T5; take auto, "
            "sdpa or eager"
        )
    return "eager" if requested == "eager" else "sdpa"


def _wants_liger(model: BlipModelConfig, llm: nn.Module, runs_on: torch.device | str, *, log: bool) -> bool:
    kernels = model.instructblip.kernels
    if isinstance(llm, LlamaForCausalLM):
        return choose_kernels(kernels, runs_on, llm.config.hidden_act, f"{KEY}.kernels", log=log) == "liger"
    if kernels == "liger":
        raise InputError(f"{KEY}.kernels: found 'liger', but it has none for a T5; take auto or torch")
    return False


def check_blip_sources(model: BlipModelConfig) -> None:
    """Checks names and shapes of the weights' files, without reading them. Raises InputError."""
    config = blip_config(model.instructblip.source, model.instructblip.config, None)
    open_blip(model.instructblip.source, empty_blip(config, "sdpa"), model.seed)
    if model.instructblip.adapters is not None:
        PeftFolder(model.instructblip.adapters, model.instructblip, config)


def blip_weight_files(model: BlipModelConfig) -> dict[str, dict[str, Path]]:
    """`vltrain.models.build.weight_files` of an InstructBLIP."""
    blip = model.instructblip
    config = blip_config(blip.source, blip.config, None)
    found = {f"{KEY}.source": open_blip(blip.source, empty_blip(config, "sdpa"), model.seed).files}
    if blip.adapters is not None:
        found[f"{KEY}.adapters"] = peft_files(blip.adapters)
    return {key: files for key, files in found.items() if files}


def _finish(
    network: nn.Module, model: BlipModelConfig, weights: Weights | None, dtype: torch.dtype, place: Place
) -> None:
    blip, llm = model.instructblip, network.language_model
    frozen = {16: torch.bfloat16, 32: torch.float32}.get(model.bits, dtype)
    parts = trained_parts(model)
    kind = "t5" if hasattr(llm, "shared") else "llama"
    start = (
        PeftFolder(blip.adapters, blip, network.config) if weights is not None and blip.adapters is not None else None
    )
    for part, name, unit, is_block in blip_units(network):
        trained = part in parts
        if weights is not None:
            weights.fill(name, unit, torch.float32 if trained else frozen)
        unit.requires_grad_(trained)
        tie_embeddings(llm)
        if weights is not None and is_block and not trained and part != "qformer" and model.bits in QUANTISED_BITS:
            quantise_linears(unit, model.bits)
        if is_block and part in ("qformer", "llm"):
            tuning, which = (blip.qformer, "qformer") if part == "qformer" else (blip.llm, kind)
            insert_low_rank(unit, name, which, tuning, model.instructblip.adalora.init_rank, model.seed)
            for inner, parameter in unit.named_parameters():
                if is_low_rank(inner):  # peft gives them the dtype of what they wrap, and then their rank a gradient
                    parameter.data = parameter.data.float()
                    parameter.requires_grad_(".lora_" in inner)
        if start is not None:
            start.fill(name, unit)
        if place is not None and part != "bridge":
            place(unit)
    if weights is not None:
        weights.fill("", network, torch.float32)
    network.query_tokens.requires_grad_(True)
    if start is not None:
        start.fill_one("query_tokens", network.query_tokens)
        start.finish()
    if place is not None:
        place(network.vision_model.post_layernorm)


def trained_parts(model: BlipModelConfig) -> set[str]:
    """The parts (`InstructBlip.PARTS`) whose parameters a recipe trains; of peft's, not the rank that AdaLoRA's layers
    divide by."""
    blip = model.instructblip
    modes = {"vision": blip.vision, "qformer": blip.qformer.mode, "llm": blip.llm.mode}
    return ALWAYS_TRAINED | {part for part, mode in modes.items() if mode == "full"}


def _assert_trainable(model: InstructBlip, config: BlipModelConfig) -> None:
    """By name: the bridge, networks tuned in full, and factors exactly where the recipe's targets are."""
    blip = config.instructblip
    kind = "t5" if model.is_encoder_decoder else "llama"
    parts = trained_parts(config)
    wrong = []
    for name, parameter in model.named_parameters():
        part = model.part_of(name)
        expected = part in parts and (part != "peft" or ".lora_" in name)
        wrong += [name] if parameter.requires_grad != expected else []
    assert not wrong, f"parameters that are trained but should not be, or the other way round: {wrong[:8]}"
    for root, network, tuning in (("qformer", "qformer", blip.qformer), ("llm", kind, blip.llm)):
        wrapped = {
            name.partition(".lora_A.")[0]
            for name, _ in model.named_parameters()
            if name.startswith(f"{root}.") and ".lora_A." in name
        }
        due = tuning.targets if tuning.mode in ("lora", "adalora") else ()
        for target in due:
            hit = {layer for layer in wrapped if any(layer.endswith(f".{name}") for name in TARGETS[network][target])}
            if not hit:
                raise InputError(
                    f"model.instructblip.{root}.targets: '{target}' matches no layer of this {network}; leave it out"
                )
