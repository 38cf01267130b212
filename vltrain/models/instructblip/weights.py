"""An InstructBLIP's sizes and weights: a folder or hub name in transformers' layout, or random ones; loaded unit by
unit.

Its LLM is a T5 (Flan-T5) or a LLaMA (Vicuna); transformers would take others, which nothing here was proven with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    PreTrainedConfig,
)  # fmt: skip

from vltrain.errors import InputError, nearest
from vltrain.files.locate import locate
from vltrain.models.backbones.llama import LLAMA
from vltrain.models.backbones.t5 import T5
from vltrain.models.materialise import RandomWeights, Weights, empty_model, fill_by_name
from vltrain.models.pretrained.checkpoint_config import read_values, try_config
from vltrain.models.pretrained.hugging_face import Beside, HuggingFaceWeights, has_own_head
from vltrain.models.pretrained.rotary import rotary_frequencies
from vltrain.models.random import seeded

KEY = "model.instructblip"
LANGUAGE_MODELS: dict[str, type[PreTrainedConfig]] = {"llama": LLAMA.config, "t5": T5.config}
PARTS = {"vision_config": InstructBlipVisionConfig, "qformer_config": InstructBlipQFormerConfig}
HEAD = "language_model.lm_head.weight"
TABLES = {"llama": "language_model.model.embed_tokens.weight", "t5": "language_model.shared.weight"}
T5_COPIES = tuple(f"language_model.{side}.embed_tokens.weight" for side in ("encoder", "decoder"))
DROPOUTS = (
    "attention_dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout_rate",
    "classifier_dropout",
)
VISION_STD = 0.02  # of random weights, as the Q-Former's and CLIP's


def blip_config(source: str | None, values: dict[str, Any], dropout: float | None) -> InstructBlipConfig:
    """The sizes: those of the checkpoint `source`, or `values` for random weights; with `dropout`, unless None, for
    every dropout rate.

    Raises: InputError for a checkpoint of another architecture, unknown names, an LLM that is neither T5 nor LLaMA.
    """
    config = _config_from_values(values) if source is None else _read_config(source)
    kind = config.text_config.model_type
    if kind not in LANGUAGE_MODELS:
        raise InputError(f"{KEY}: its LLM is of type '{kind}', expected t5 (Flan-T5) or llama (Vicuna)")
    for part in (config.vision_config, config.qformer_config, config.text_config) if dropout is not None else ():
        for name in DROPOUTS:
            if getattr(part, name, None) is not None:
                setattr(part, name, dropout)
    return config


def _config_from_values(values: dict[str, Any]) -> InstructBlipConfig:
    _require_known(values, InstructBlipConfig, "")
    for name, config_class in PARTS.items():
        _require_known(values.get(name, {}), config_class, f".{name}")
    text = dict(values.get("text_config", {}))
    kind = text.pop("model_type", None)
    if kind not in LANGUAGE_MODELS:
        raise InputError(
            f"{KEY}.config.text_config.model_type: found {kind!r}, expected one of {', '.join(LANGUAGE_MODELS)}"
        )
    _require_known(text, LANGUAGE_MODELS[kind], ".text_config")
    # transformers' default of 1e-10 is for weights that are then loaded: with it all images would look the same to a
    # random ViT.
    values = {**values, "vision_config": {"initializer_range": VISION_STD, **values.get("vision_config", {})}}
    return try_config(
        f"{KEY}.config.", values, lambda given: InstructBlipConfig(**given), InstructBlipForConditionalGeneration
    )


def _require_known(values: Any, config_class: type[PreTrainedConfig], where: str) -> None:
    if not isinstance(values, dict):
        raise InputError(f"{KEY}.config{where}: found {values!r}, expected a section with keys of its own")
    # T5's is no field of its config's class, and said by every released one.
    known = {entry.name for entry in fields(config_class)} | {"tie_word_embeddings", "decoder_start_token_id"}
    for name in values:
        if name not in known:
            raise InputError(
                f"{KEY}.config{where}.{name}: {config_class.__name__} has no such setting; {nearest(name, known)}"
            )


def _read_config(source: str) -> InstructBlipConfig:
    place = _place(source)
    found = read_values(KEY, source, place, {})
    if found.get("model_type") != "instructblip":
        raise InputError(
            f"{KEY}.source: '{source}' ({place}) is a model of type {found.get('model_type')!r:.80}, expected "
            "'instructblip'"
        )
    where = f"{KEY}.source: {Path(place, 'config.json')}: "
    config = try_config(where, found, InstructBlipConfig.from_dict, InstructBlipForConditionalGeneration)
    text = config.text_config
    if (
        text.model_type == "llama"
        and text.tie_word_embeddings
        and has_own_head(KEY, source, place, HEAD, (TABLES["llama"],))
    ):
        text.tie_word_embeddings = False
    return config


def _place(source: str) -> str:
    try:
        return locate(source)
    except InputError as error:
        raise InputError(f"{KEY}.source: {error}") from None


def empty_blip(config: InstructBlipConfig, attention: str) -> InstructBlipForConditionalGeneration:
    """The network without memory, its tied weights tied. `attention`: of a LLaMA, see `vltrain.ops.attention`."""
    is_llama = config.text_config.model_type == "llama"
    attentions = {"text_config": attention if is_llama else "sdpa", "vision_config": "sdpa", "qformer_config": "sdpa"}
    if attention == "eager":
        attentions = dict.fromkeys(attentions, "eager")
    network = empty_model(InstructBlipForConditionalGeneration, config, attentions)
    tie_embeddings(network.language_model)
    return network


def tie_embeddings(llm: nn.Module) -> None:
    """Lets what shares the embeddings' weight share it, and the head have its own: to be called whenever they were
    given another.

    T5 scales its last states where the head shares that weight (the first T5s), and has a head of its own where it does
    not (Flan-T5).
    """
    is_t5 = hasattr(llm, "shared")
    table = llm.shared if is_t5 else llm.model.embed_tokens
    if is_t5:
        llm.encoder.embed_tokens.weight = llm.decoder.embed_tokens.weight = table.weight
    if llm.config.scale_decoder_outputs if is_t5 else llm.config.tie_word_embeddings:
        llm.lm_head.weight = table.weight
    elif llm.lm_head.weight is table.weight:  # transformers ties T5's always, until a file proves it wrong
        llm.lm_head.weight = nn.Parameter(torch.empty_like(table.weight, device="meta"))


def blip_units(network: InstructBlipForConditionalGeneration) -> Iterator[tuple[str, str, nn.Module, bool]]:
    """What is loaded at once, in the order of the forward: (part, name, module, is it a transformer block?); together
    all parameters but the queries. Parts: vision, qformer, bridge (norm behind the ViT, projection), llm."""
    vision, llm = network.vision_model, network.language_model
    yield "vision", "vision_model.embeddings", vision.embeddings, False
    yield from (
        ("vision", f"vision_model.encoder.layers.{number}", layer, True)
        for number, layer in enumerate(vision.encoder.layers)
    )
    yield "bridge", "vision_model.post_layernorm", vision.post_layernorm, False
    yield "qformer", "qformer.embeddings", network.qformer.embeddings, False
    yield from (
        ("qformer", f"qformer.encoder.layer.{number}", layer, True)
        for number, layer in enumerate(network.qformer.encoder.layer)
    )
    yield "bridge", "language_projection", network.language_projection, False
    if hasattr(llm, "shared"):
        yield "llm", "language_model.shared", llm.shared, False
        for side in ("encoder", "decoder"):
            stack = getattr(llm, side)
            yield from (
                ("llm", f"language_model.{side}.block.{number}", block, True)
                for number, block in enumerate(stack.block)
            )
            yield "llm", f"language_model.{side}.final_layer_norm", stack.final_layer_norm, False
    else:
        yield "llm", "language_model.model.embed_tokens", llm.model.embed_tokens, False
        yield from (
            ("llm", f"language_model.model.layers.{number}", block, True)
            for number, block in enumerate(llm.model.layers)
        )
        yield "llm", "language_model.model.norm", llm.model.norm, False
    yield "llm", "language_model.lm_head", llm.lm_head, False


class RandomBlipWeights:
    """transformers' own initialisation of each part; the queries, which it would leave at zero, are drawn with a
    deviation of 0.02.

    From zero they would all stay equal, and LayerNorm gives them gradients near 1e7.
    """

    def __init__(self, network: InstructBlipForConditionalGeneration, seed: int) -> None:
        owners = {
            "vision_model": network.vision_model,
            "qformer": network.qformer,
            "language_model": network.language_model,
        }
        self._parts = {name: RandomWeights(owner, seed, f"blip/{name}") for name, owner in owners.items()}
        self._rest, self._seed = RandomWeights(network, seed, "blip"), seed
        self.files: dict[str, Path] = {}

    def fill(self, name: str, unit: nn.Module, dtype: torch.dtype) -> None:
        if name:
            self._parts.get(name.partition(".")[0], self._rest).fill(name, unit, dtype)
            return
        with seeded(self._seed, "blip/query_tokens"):
            fill_by_name("", unit, dtype, lambda _, tensor: tensor.copy_(0.02 * torch.randn(tensor.shape)))


def open_blip(source: str | None, network: InstructBlipForConditionalGeneration, seed: int) -> Weights:
    """The weights of `source`, or random ones, for an empty network of the sizes that `blip_config` says.

    Raises: InputError for a file that is missing or broken, and for weights that are missing, unknown or of another
    shape.
    """
    if source is None:
        return RandomBlipWeights(network, seed)
    text = network.config.text_config
    is_llama = text.model_type == "llama"
    table = TABLES[text.model_type]
    copies = {} if is_llama else dict.fromkeys(T5_COPIES, table)
    if text.tie_word_embeddings if is_llama else text.scale_decoder_outputs:
        copies[HEAD] = table
    beside = Beside(copies=copies, rotary=rotary_frequencies(text) if is_llama else ())
    return HuggingFaceWeights(KEY, source, _place(source), network, lambda name: name, beside)
