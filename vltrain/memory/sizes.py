"""Sizes of published networks, for planning with weights that are not on this machine.

What is on this machine is read; else a source's name (`weights/llama-2-7b`, `meta-llama/Llama-2-7b-hf`,
`diht_vitl14_336px.ckpt`) or the name that the user gives tells which network is meant. Nothing is downloaded. The table
holds assumptions, so what is taken from it is said.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import Any

from huggingface_hub import try_to_load_from_cache

from vltrain.config.model.base import ModelConfig
from vltrain.errors import InputError, nearest
from vltrain.files.locate import locate
from vltrain.models.pretrained.clip_state import ACTIVATIONS

# A folder with one of these says its network's sizes; a tokenizer beside them does not.
SAYS_SIZES = ("config.json", "consolidated.00.pth")


@dataclass(frozen=True)
class Network:
    """A published network: its sizes as transformers' config has them, and parts of names (letters and digits alone)
    that mean it."""

    config: dict[str, Any]
    aliases: tuple[str, ...]


def _llama(
    width: int, ffn: int, blocks: int, heads: int, kv_heads: int, vocabulary: int, *aliases: str, **more: Any
) -> Network:
    sizes = {
        "hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, **more,
    }  # fmt: skip
    return Network(sizes, aliases)


def _vit(width: int, blocks: int, patch: int, image: int, *aliases: str) -> Network:
    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": blocks,
        "num_attention_heads": width // 64,
        "patch_size": patch,
        "image_size": image,
    }
    return Network(sizes, aliases)


LLMS: dict[str, Network] = {
    "llama-7b": _llama(4096, 11008, 32, 32, 32, 32000, "llama7b", "llama17b", "vicuna7b"),
    "llama-13b": _llama(5120, 13824, 40, 40, 40, 32000, "llama13b", "llama113b", "vicuna13b"),
    "llama-30b": _llama(6656, 17920, 60, 52, 52, 32000, "llama30b", "llama33b"),
    "llama-65b": _llama(8192, 22016, 80, 64, 64, 32000, "llama65b"),
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000, "llama27b"),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32000, "llama213b"),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000, "llama270b"),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256, "llama38b", "llama318b"),
    "tinyllama-1.1b": _llama(2048, 5632, 22, 32, 4, 32000, "tinyllama"),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, "smollm2135m", "llmsmollm2", tie_word_embeddings=True),
    "smollm2-360m": _llama(960, 2560, 32, 15, 5, 49152, "smollm2360m", tie_word_embeddings=True),
    "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, 49152, "smollm217b", tie_word_embeddings=True),
}
VITS: dict[str, Network] = {
    "vit-b/32": _vit(768, 12, 32, 224, "vitb32", "vitbasepatch32", "alip"),
    "vit-b/16": _vit(768, 12, 16, 224, "vitb16", "vitbasepatch16"),
    "vit-l/14": _vit(1024, 24, 14, 224, "vitl14", "vitlargepatch14"),
    "vit-l/14-336": _vit(1024, 24, 14, 336, "vitl14336", "vitlargepatch14336"),
}


def _flan_t5(width: int, ffn: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "d_model": width,
        "d_kv": 64,
        "d_ff": ffn,
        "num_layers": 24,
        "num_heads": heads,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }


# transformers' defaults are the released ViT-g and Q-Former, but for its token [DEC] behind BERT's 30,522; Vicuna's
# table has one more than LLaMA's.
_QFORMER: dict[str, Any] = {"qformer_config": {"vocab_size": 30523}}
BLIPS: dict[str, Network] = {
    "instructblip-flan-t5-xl": Network(
        {"text_config": _flan_t5(2048, 5120, 32), **_QFORMER}, ("instructblipflant5xl",)
    ),
    "instructblip-flan-t5-xxl": Network(
        {"text_config": _flan_t5(4096, 10240, 64), **_QFORMER}, ("instructblipflant5xxl",)
    ),
    **{
        f"instructblip-vicuna-{size}": Network(
            {"text_config": {"model_type": "llama", **LLMS[f"llama-{size}"].config, "vocab_size": 32001}, **_QFORMER},
            (f"instructblipvicuna{size}",),
        )
        for size in ("7b", "13b")
    },
}


def assume_sizes(
    model: ModelConfig, llm: str | None = None, vision: str | None = None, instructblip: str | None = None
) -> tuple[ModelConfig, list[str]]:
    """A recipe's model with sizes in the place of weights that are not here, to build an outline from; and, in words,
    what was assumed.

    Args:
        llm, vision, instructblip: names of `LLMS`, `VITS` and `BLIPS` to plan with, whatever the recipe names.

    Raises: InputError for weights that are neither here nor known by their name, for unknown names, and for those of
    another architecture.
    """
    is_blip = model.architecture == "instructblip"
    for option, name, has_effect in (
        ("--llm-size", llm, not is_blip),
        ("--vision-size", vision, not is_blip),
        ("--instructblip-size", instructblip, is_blip),
    ):
        if name is not None and not has_effect:
            raise InputError(f"{option}: has no effect on the architecture {model.architecture}; leave it out")
    if is_blip:
        return _assume_blip(model, instructblip)
    assumed = []
    name = _choose("model.vision.source", model.vision.source, VITS, vision, "--vision-size")
    if name is not None:
        assumed.append(_told("model.vision.source", model.vision.source, vision, name))
        config = {**VITS[name].config, "hidden_act": ACTIVATIONS[model.vision.kind or "clip"]}
        model = replace(model, vision=replace(model.vision, source=None, kind=None, config=config))
    name = _choose("model.llm.source", model.llm.source, LLMS, llm, "--llm-size")
    if name is not None:
        assumed.append(_told("model.llm.source", model.llm.source, llm, name))
        tokenizer = model.llm.tokenizer or model.llm.source
        model = replace(model, llm=replace(model.llm, source=None, config=LLMS[name].config, tokenizer=tokenizer))
    return model, assumed


def _assume_blip(model: ModelConfig, named: str | None) -> tuple[ModelConfig, list[str]]:
    blip = model.instructblip
    name = _choose("model.instructblip.source", blip.source, BLIPS, named, "--instructblip-size")
    if name is None:
        return model, []
    tokenizers = {key: getattr(blip, key) or blip.source for key in ("tokenizer", "qformer_tokenizer")}
    sized = replace(blip, source=None, config=BLIPS[name].config, **tokenizers)
    return replace(model, instructblip=sized), [_told("model.instructblip.source", blip.source, named, name)]


def _choose(key: str, source: str | None, table: dict[str, Network], named: str | None, option: str) -> str | None:
    """Which network of the table to assume; None where the sizes can be read."""
    if named is not None:
        if named not in table:
            raise InputError(f"{option}: unknown size '{named}', {nearest(named, table)}")
        return named
    if source is None or is_here(source):
        return None
    plain = _letters_and_digits(source)
    found = [(len(alias), name) for name, network in table.items() for alias in network.aliases if alias in plain]
    if not found:
        raise InputError(
            f"{key}: '{source}' is not on this machine, and its name is that of no network whose sizes are known; "
            f"give one of {', '.join(table)} by {option}, or fetch its config"
        )
    return max(found)[1]


def is_here(source: str, files: tuple[str, ...] = SAYS_SIZES) -> bool:
    """Whether what a source names can be read without fetching anything: a file, or a folder with one of `files`."""
    try:
        path = locate(source)
    except InputError:
        return False
    if os.path.isdir(path):
        return any(os.path.exists(os.path.join(path, name)) for name in files)
    return os.path.isfile(path) or any(isinstance(try_to_load_from_cache(path, name), str) for name in files)


def _letters_and_digits(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _told(key: str, source: str | None, named: str | None, name: str) -> str:
    reason = "as asked for" if named else "by its name, since it is not on this machine"
    return f"{key} ({source or 'random weights'}): sizes of {name}, {reason}"
