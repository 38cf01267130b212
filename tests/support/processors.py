"""Tiny processors of transformers' families: a tokenizer of bytes, the family's own image processor at small sizes, and
the config of a random model that belongs to them. Nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.support.stock import QWEN, TEXT, VIT
from vltrain.data.stock.source import StockSource

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As the released ones of LLaVA-1.5, SmolVLM and Gemma 3 write.
VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == "
    "'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<start_of_image>' }}{% else %}{{ item['text'] | trim }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SQUARE = {"height": 32, "width": 32}
CLIP = {"size": {"shortest_edge": 32}, "crop_size": SQUARE, "do_center_crop": True, **HALF}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
TILED = {
    "size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": True, **HALF
}  # fmt: skip
ROWS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


SMOLVLM_TOKENS = [
    "<|im_start|>", "<|im_end|>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *ROWS
]  # fmt: skip
GEMMA_TOKENS = [
    "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"
]  # fmt: skip


class Kind:
    """One family. tokens: special ones; named: what the tokenizer calls some; images: of its image processor; own: of
    its processor; config: of its model, without the ids."""

    def __init__(
        self, processor: str, image_processor: str, tokens: list[str], template: str | None, image: str,
        images: dict[str, Any], config: dict[str, Any], *, named: dict[str, str] | None = None,
        own: dict[str, Any] | None = None, bos: str | None = None,
    ) -> None:  # fmt: skip
        self.processor, self.image_processor, self.tokens, self.template = processor, image_processor, tokens, template
        self.image, self.images, self.config, self.bos = image, images, config, bos
        self.named, self.own = named or {}, own or {}


QWEN_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_IMAGES = {
    "patch_size": 8, "temporal_patch_size": 2, "merge_size": 2, "size": {"shortest_edge": 1024, "longest_edge": 16384},
    **HALF,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e4}


def _qwen(processor: str, kind: str, vision: dict[str, Any], rope: dict[str, Any]) -> Kind:
    config = {
        "model_type": kind, "vision_config": {**QWEN, **vision}, "text_config": {**TEXT, "rope_parameters": rope}
    }  # fmt: skip
    template = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return Kind(
        processor, "Qwen2VLImageProcessor", QWEN_TOKENS, template, "<|image_pad|>", QWEN_IMAGES, config,
        named={"eos_token": "<|im_end|>"},
    )  # fmt: skip


def _llava(kind: str, processor: str, images: str, template: str, values: dict[str, Any], **own: Any) -> Kind:
    config = {
        "model_type": kind, "vision_config": {"model_type": "clip_vision_model", **VIT},
        "text_config": {"model_type": "llama", **TEXT}, "vision_feature_layer": -2, **values,
    }  # fmt: skip
    if kind == "llava_onevision":
        own_tower = {"model_type": "siglip_vision_model", **VIT}
        config |= {
            "vision_config": own_tower, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"
        }  # fmt: skip
    sizes = {**CLIP, "image_grid_pinpoints": PINPOINTS} if kind != "llava" else CLIP
    if kind == "llava_onevision":
        sizes = {"size": SQUARE, "image_grid_pinpoints": PINPOINTS, **HALF}
    return Kind(
        processor, images, ["<s>", "</s>", "<image>", "<video>", "<|im_start|>", "<|im_end|>"], template, "<image>",
        sizes, config, named={"bos_token": "<s>", "eos_token": "</s>"}, bos="<s>", own=own,
    )  # fmt: skip


KINDS: dict[str, Kind] = {
    "qwen3_vl": _qwen(
        "Qwen3VLProcessor", "qwen3_vl", {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        {**MROPE, "mrope_section": [3, 3, 2], "mrope_interleaved": True},
    ),
    "qwen2_5_vl": _qwen(
        "Qwen2_5_VLProcessor", "qwen2_5_vl", {"window_size": 32, "fullatt_block_indexes": [1]},
        {**MROPE, "mrope_section": [2, 3, 3]},
    ),
    "llava": _llava(
        "llava", "LlavaProcessor", "CLIPImageProcessor", VICUNA, {}, patch_size=8, num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    ),
    "llava_next": _llava(
        "llava_next", "LlavaNextProcessor", "LlavaNextImageProcessor", VICUNA, {"image_grid_pinpoints": PINPOINTS},
        patch_size=8, num_additional_image_tokens=1, vision_feature_select_strategy="default",
    ),
    "llava_onevision": _llava(
        "llava_onevision", "LlavaOnevisionProcessor", "LlavaOnevisionImageProcessor",
        CHATML.replace("IMAGE", "<image>"), {"image_grid_pinpoints": PINPOINTS},
        num_image_tokens=16, vision_feature_select_strategy="full",
    ),
    "internvl": Kind(
        "InternVLProcessor", "GotOcr2ImageProcessor",
        ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
        CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"), "<IMG_CONTEXT>",
        {"size": SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4, **HALF},
        {
            "model_type": "internvl", "vision_config": {**VIT, "image_size": [32, 32], "patch_size": [8, 8]},
            "text_config": {"model_type": "qwen2", **TEXT}, "downsample_ratio": 0.5,
        },
        named={
            "eos_token": "<|im_end|>", "start_image_token": "<img>", "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
        },
        own={"image_seq_length": 4},
    ),
    "smolvlm": Kind(
        "SmolVLMProcessor", "SmolVLMImageProcessor",
        SMOLVLM_TOKENS,
        SMOLVLM, "<image>", TILED,
        {
            "model_type": "smolvlm", "vision_config": dict(VIT), "text_config": {"model_type": "llama", **TEXT},
            "scale_factor": 2,
        },
        named={"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>"}, own={"image_seq_len": 4},
    ),
    "idefics3": Kind(
        "Idefics3Processor", "Idefics3ImageProcessor",
        SMOLVLM_TOKENS,
        SMOLVLM, "<image>", TILED,
        {
            "model_type": "idefics3", "vision_config": dict(VIT), "text_config": {"model_type": "llama", **TEXT},
            "scale_factor": 2,
        },
        named={"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>"}, own={"image_seq_len": 4},
    ),
    "gemma3": Kind(
        "Gemma3Processor", "Gemma3ImageProcessor",
        GEMMA_TOKENS,
        GEMMA, "<image_soft_token>", {"size": SQUARE, "image_seq_length": 4, **HALF},
        {
            "model_type": "gemma3", "vision_config": {"model_type": "siglip_vision_model", **VIT},
            # A window in every layer would hide images from answers.
            "text_config": {
                "model_type": "gemma3_text", **TEXT, "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "mm_tokens_per_image": 4,
        },
        named={
            "bos_token": "<bos>", "eos_token": "<eos>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        own={"image_seq_length": 4}, bos="<bos>",
    ),
    "paligemma": Kind(
        "PaliGemmaProcessor", "SiglipImageProcessor", ["<bos>", "<eos>", "<image>"], None, "<image>",
        {"size": SQUARE, "image_seq_length": 16, **HALF},
        {
            "model_type": "paligemma",
            "vision_config": {"model_type": "siglip_vision_model", **VIT, "projection_dim": 64},
            "text_config": {"model_type": "gemma", **TEXT, "vocab_size": 1500}, "projection_dim": 64,
        },
        named={"bos_token": "<bos>", "eos_token": "<eos>"},
    ),
}  # fmt: skip


def make_tokenizer(kind: Kind) -> PreTrainedTokenizerFast:
    """One token a byte, and the kind's special ones; with a `bos`, texts get that in front."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in kind.tokens])
    if kind.bos:
        number = backend.token_to_id(kind.bos)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{kind.bos} $A", pair=f"{kind.bos} $A $B", special_tokens=[(kind.bos, number)]
        )
    named = {name: token for name, token in kind.named.items() if name in ("bos_token", "eos_token")}
    extra = {name: token for name, token in kind.named.items() if name not in named}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **named, pad_token=named["eos_token"], extra_special_tokens=extra
    )


def make_processor(name: str, folder: Path, **images: Any) -> StockSource:
    """Writes a processor's folder, and says where it and its model are. `images`: of its image processor."""
    kind = KINDS[name]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(kind)
    tokenizer.save_pretrained(folder)
    settings = {
        "image_processor_type": kind.image_processor,
        "processor_class": kind.processor,
        **kind.images,
        **images,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    if kind.own:
        own = {"processor_class": kind.processor, **kind.own}
        (folder / "processor_config.json").write_text(json.dumps(own))
    if kind.template is not None:
        (folder / "chat_template.jinja").write_text(kind.template)
    return StockSource("model.stock.processor", str(folder), None, json.dumps(config_of(name)), "{}")


def config_of(name: str) -> dict[str, Any]:
    """The model's config, with the tokenizer's ids and as many rows."""
    kind = KINDS[name]
    tokenizer = make_tokenizer(kind)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in kind.tokens}
    config = json.loads(json.dumps(kind.config))
    config["image_token_id"] = ids[kind.image]
    if name.startswith("qwen"):
        config |= {
            "video_token_id": ids["<|video_pad|>"], "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
        }  # fmt: skip
    config["text_config"]["vocab_size"] = max(config["text_config"]["vocab_size"], len(tokenizer) + 8)
    return config
