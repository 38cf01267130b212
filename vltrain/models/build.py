"""From a recipe's `ModelConfig` to a model whose trained parameters are exactly those the recipe means.

Trained parameters are fp32, frozen ones have the dtype asked for; the trainable set is asserted, part by part, before the
model is handed out.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn
from transformers import CLIPVisionModel, LlamaForCausalLM

from vltrain.config import ModelConfig
from vltrain.models.adapters import Adapter, Routing, insert_adapters, is_routed
from vltrain.models.llm import LLM_NORMS, llm_blocks, prepare_llm
from vltrain.models.lora import insert_peft, is_peft_parameter, peft_parameters
from vltrain.models.multimodal import MultimodalModel
from vltrain.models.neck import make_neck
from vltrain.models.random import seeded
from vltrain.models.vision import VISION_NORMS, ClipTaps
from vltrain.models.weights import clip_config, llama_config, load_clip, load_llama
from vltrain.ops.attention import choose_attention

PARTS = ("adapter", "peft", "neck", "modality", "vision", "llm")
MODALITY_STD = 0.02  # as LLaMA's own token embeddings


def build_model(
    model: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    activation_checkpointing: bool = False,
    device: torch.device | str = "cpu",
) -> MultimodalModel:
    """The model of a recipe, in training mode.

    Args:
        dtype: of frozen weights; trained ones are always fp32.
        activation_checkpointing: recompute each block in the backward pass.
        device: where it is put; "meta" builds shapes only, to count with.

    Raises: InputError for weights that are missing or do not fit, unknown adapters, and widths that groups do not divide.
    """
    parts = trained_parts(model)
    with torch.device("meta") if torch.device(device).type == "meta" else nullcontext():
        vision = ClipTaps(_make_clip(model, "vision" in parts, dtype), model.vision.tap_every, activation_checkpointing)
        llm = _make_llm(model, "llm" in parts, dtype, device)
        routing = Routing() if is_routed(model.adapter) else None
        prepare_llm(llm, activation_checkpointing, routing)
        insert_adapters(vision.live_blocks, VISION_NORMS, model.adapter.vision, model.adapter, seed=model.seed, part="vision")
        insert_adapters(llm_blocks(llm), LLM_NORMS, model.adapter.llm, model.adapter, seed=model.seed, part="llm", routing=routing)
        insert_peft(llm, model.llm.peft, model.seed)
        with seeded(model.seed, "neck"):
            neck = make_neck(vision.width, llm.config.hidden_size, model.neck)
        with seeded(model.seed, "modality"):
            modality_embedding = nn.Embedding(2, llm.config.hidden_size)
            nn.init.normal_(modality_embedding.weight, std=MODALITY_STD)
    built = MultimodalModel(vision, neck, modality_embedding, llm, routing)
    _set_trainable(built, parts, dtype)
    return built.to(device).train()


def _make_clip(model: ModelConfig, trained: bool, dtype: torch.dtype) -> CLIPVisionModel:
    config = clip_config("model.vision", model.vision.source, model.vision.config, model.vision.kind)
    attention = "eager" if model.llm.attention == "eager" else "sdpa"
    if model.vision.source is None or _on_meta():
        with seeded(model.seed, "vision"):
            return CLIPVisionModel._from_config(config, attn_implementation=attention)
    return load_clip("model.vision", model.vision.source, config, torch.float32 if trained else dtype, attention)


def _make_llm(model: ModelConfig, trained: bool, dtype: torch.dtype, device: torch.device | str) -> LlamaForCausalLM:
    config = llama_config("model.llm", model.llm.source, model.llm.config)
    attention = choose_attention(model.llm.attention, device)
    if model.llm.source is None or _on_meta():
        with seeded(model.seed, "llm"):
            return LlamaForCausalLM._from_config(config, attn_implementation=attention)
    return load_llama("model.llm", model.llm.source, config, torch.float32 if trained else dtype, attention)


def _on_meta() -> bool:
    return torch.get_default_device().type == "meta"


def part_of(name: str) -> str:
    """Which of `PARTS` the parameter of that name (of `MultimodalModel.named_parameters`) belongs to."""
    if ".adapter." in name:
        return "adapter"
    if is_peft_parameter(name):
        return "peft"
    root = name.split(".", 1)[0]
    part = {"modality_embedding": "modality"}.get(root, root)
    assert part in PARTS, f"parameter '{name}' belongs to no part"
    return part


def trained_parts(model: ModelConfig) -> set[str]:
    """The parts of `PARTS` whose parameters a recipe trains."""
    parts = {"adapter", "peft", "neck", "modality"}
    full = model.tune == "full"
    return parts | ({"vision"} if full or model.vision.train else set()) | ({"llm"} if full or model.llm.train else set())


def count_parameters(model: MultimodalModel) -> dict[str, tuple[int, int]]:
    """By part: (parameters, trained parameters). A tied weight is counted once."""
    counts = {part: (0, 0) for part in PARTS}
    for name, parameter in model.named_parameters():
        total, trained = counts[part_of(name)]
        counts[part_of(name)] = (total + parameter.numel(), trained + parameter.numel() * parameter.requires_grad)
    return counts


def _set_trainable(model: MultimodalModel, parts: set[str], dtype: torch.dtype) -> None:
    unused = model.vision.unused_parameters()
    for name, parameter in model.named_parameters():
        trained = part_of(name) in parts and parameter not in unused
        parameter.requires_grad_(trained)
        parameter.data = parameter.data.to(torch.float32 if trained else dtype)
    _assert_trainable(model, parts)


def _assert_trainable(model: MultimodalModel, parts: set[str]) -> None:
    """By module, not by name: what is trained are whole adapters, peft's factors and prompts, neck and modality embedding, and a part's own
    weights if it is."""
    adapters = {parameter for module in model.modules() if isinstance(module, Adapter) for parameter in module.parameters()}
    expected = adapters | peft_parameters(model.llm) | {*model.neck.parameters(), *model.modality_embedding.parameters()}
    for part, module in (("vision", model.vision), ("llm", model.llm)):
        expected |= set(module.parameters()) if part in parts else set()
    expected -= model.vision.unused_parameters()
    wrong = [name for name, parameter in model.named_parameters() if parameter.requires_grad != (parameter in expected)]
    assert not wrong, f"parameters that are trained but should not be, or the other way round: {wrong}"
