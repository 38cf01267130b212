"""Sizes of published vision-language models, as their config.json has them, to plan with where they are not on this
machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vltrain.config.model.stock import StockConfig
from vltrain.models.backbones.family import Network
from vltrain.models.interface import PublishedSizes


def _text(kind: str, width: int, ffn: int, blocks: int, heads: int, kv: int, words: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind, "hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": blocks,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": words, **more,
    }  # fmt: skip


def _vit(kind: str, width: int, ffn: int, blocks: int, heads: int, image: int, patch: int) -> dict[str, Any]:
    return {
        "model_type": kind, "hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": blocks,
        "num_attention_heads": heads, "image_size": image, "patch_size": patch,
    }  # fmt: skip


def _mrope(theta: float, *section: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": list(section), **more}


def _smolvlm(width: int, ffn: int, blocks: int, heads: int, kv: int) -> dict[str, Any]:
    return {
        "model_type": "smolvlm",
        "vision_config": _vit("smolvlm_vision", 768, 3072, 12, 12, 512, 16),
        "text_config": _text("llama", width, ffn, blocks, heads, kv, 49280, pad_token_id=2),
        "scale_factor": 4,
        "image_token_id": 49190,
        "tie_word_embeddings": False,
        "pad_token_id": 2,
    }


_QWEN_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


def _qwen2_5_vl(width: int, ffn: int, blocks: int, heads: int, kv: int, words: int, tied: bool) -> dict[str, Any]:
    text = _text("qwen2_5_vl_text", width, ffn, blocks, heads, kv, words, rope_parameters=_mrope(1e6, 16, 24, 24))
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": width,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
    }  # fmt: skip
    return {
        "model_type": "qwen2_5_vl",
        "text_config": {**text, "tie_word_embeddings": tied},
        "vision_config": vision,
        "tie_word_embeddings": tied,
        **_QWEN_IDS,
    }


def _qwen3_vl(
    width: int, ffn: int, blocks: int, heads: int, *, tied: bool = True, large: bool = False
) -> dict[str, Any]:
    rope = _mrope(5e6, 24, 20, 20, mrope_interleaved=True)
    text = _text("qwen3_vl_text", width, ffn, blocks, heads, 8, 151936, head_dim=128, rope_parameters=rope)
    depth, inner, ffn_vision, deep = (27, 1152, 4304, [8, 16, 24]) if large else (24, 1024, 4096, [5, 11, 17])
    vision = {
        "depth": depth, "hidden_size": inner, "intermediate_size": ffn_vision, "num_heads": 16,
        "out_hidden_size": width, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "num_position_embeddings": 2304, "deepstack_visual_indexes": deep,
    }  # fmt: skip
    return {
        "model_type": "qwen3_vl",
        "text_config": {**text, "tie_word_embeddings": tied},
        "vision_config": vision,
        "tie_word_embeddings": tied,
        **_QWEN_IDS,
    }


def _internvl(width: int, ffn: int, blocks: int, heads: int) -> dict[str, Any]:
    vision = _vit("internvl_vision", 1024, 4096, 24, 16, 448, 14)
    return {
        "model_type": "internvl",
        "vision_config": {**vision, "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True},
        "text_config": _text("qwen3", width, ffn, blocks, heads, 8, 151936, head_dim=128, tie_word_embeddings=False),
        "image_token_id": 151671,
        "image_seq_length": 256,
        "downsample_ratio": 0.5,
        "tie_word_embeddings": False,
    }


def _gemma3(width: int, ffn: int, blocks: int, heads: int, kv: int) -> dict[str, Any]:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    return {
        "model_type": "gemma3",
        "vision_config": {**_vit("siglip_vision_model", 1152, 4304, 27, 16, 896, 14), "vision_use_head": False},
        "text_config": _text(
            "gemma3_text", width, ffn, blocks, heads, kv, 262208, head_dim=256, sliding_window=1024,
            rope_parameters=rope,
        ),
        "image_token_id": 262144,
        "mm_tokens_per_image": 256,
    }  # fmt: skip


def _llava(width: int, ffn: int, blocks: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llava",
        "vision_config": _vit("clip_vision_model", 1024, 4096, 24, 16, 336, 14),
        "text_config": _text("llama", width, ffn, blocks, heads, heads, 32064, rms_norm_eps=1e-5),
        "image_token_id": 32000,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }


MODELS: dict[str, Network] = {
    "smolvlm-256m": Network(_smolvlm(576, 1536, 30, 9, 3), ("smolvlm256m",)),
    "smolvlm-500m": Network(_smolvlm(960, 2560, 32, 15, 5), ("smolvlm500m",)),
    "qwen2.5-vl-3b": Network(_qwen2_5_vl(2048, 11008, 36, 16, 2, 151936, True), ("qwen25vl3b",)),
    "qwen2.5-vl-7b": Network(_qwen2_5_vl(3584, 18944, 28, 28, 4, 152064, False), ("qwen25vl7b",)),
    "qwen3-vl-2b": Network(_qwen3_vl(2048, 6144, 28, 16), ("qwen3vl2b",)),
    "qwen3-vl-4b": Network(_qwen3_vl(2560, 9728, 36, 32), ("qwen3vl4b",)),
    "qwen3-vl-8b": Network(_qwen3_vl(4096, 12288, 36, 32, tied=False, large=True), ("qwen3vl8b",)),
    "internvl3.5-1b": Network(_internvl(1024, 3072, 28, 16), ("internvl351b",)),
    "internvl3.5-2b": Network(_internvl(2048, 6144, 28, 16), ("internvl352b",)),
    "internvl3.5-4b": Network(_internvl(2560, 9728, 36, 32), ("internvl354b",)),
    "internvl3.5-8b": Network(_internvl(4096, 12288, 36, 32), ("internvl358b",)),
    "gemma-3-4b": Network(_gemma3(2560, 10240, 34, 8, 4), ("gemma34b",)),
    "gemma-3-12b": Network(_gemma3(3840, 15360, 48, 16, 8), ("gemma312b",)),
    "llava-1.5-7b": Network(_llava(4096, 11008, 32, 32), ("llava157b",)),
    "llava-1.5-13b": Network(_llava(5120, 13824, 40, 40), ("llava1513b",)),
}


def _assume(model: StockConfig, name: str) -> StockConfig:
    stock = model.stock
    processor = stock.processor or stock.source
    return replace(model, stock=replace(stock, source=None, config=MODELS[name].config, processor=processor))


STOCK = PublishedSizes(
    name="stock",
    what="vision-language model",
    example="qwen3-vl-4b",
    key="model.stock.source",
    networks=MODELS,
    assume=_assume,
)
