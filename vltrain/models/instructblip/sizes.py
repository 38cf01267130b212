"""Sizes of the published InstructBLIPs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vltrain.config.model.instructblip import BlipModelConfig
from vltrain.models.backbones.family import Network
from vltrain.models.backbones.llama import LLMS
from vltrain.models.interface import PublishedSizes


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


def assume(model: BlipModelConfig, name: str) -> BlipModelConfig:
    """See `PublishedSizes`."""
    blip = model.instructblip
    tokenizers = {key: getattr(blip, key) or blip.source for key in ("tokenizer", "qformer_tokenizer")}
    return replace(model, instructblip=replace(blip, source=None, config=BLIPS[name].config, **tokenizers))


INSTRUCTBLIP = PublishedSizes(
    name="instructblip",
    what="InstructBLIP",
    example="instructblip-flan-t5-xl",
    key="model.instructblip.source",
    networks=BLIPS,
    assume=assume,
)
