"""Exports of pairs other than CLIP and LLaMA: folders that stock libraries read, LLaVA's among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tests.export.test_lora_and_merged import tuned_run
from tests.support.vocabularies import make_transformers
from vltrain.data.text.conversation import encode_prompt
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.errors import InputError
from vltrain.models.pretrained.readers import is_transformers_at_least
from vltrain.programs.export import export
from vltrain.schema import IMAGE_MODALITY_TOKEN, IMAGE_TOKEN, TEXT_MODALITY_TOKEN, Sample, Turn

VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
LLM = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 768, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
PATCHES = {"model__vision__tokens": "patches", "model__vision__tap_every": 4}
POOLER = {**PATCHES, "model__vision__tokens": "pooler"}
BOTH = {"model__adapter__llm": "both", "model__adapter__vision": "both"}
UNBIASED = {**BOTH, "model__adapter__bias": False}
LORA = {"model__llm__peft__kind": "lora", "model__llm__peft__targets": ("o_proj", "up_proj")}
TOWER = {"model__vision__peft__rank": 3, "model__vision__peft__targets": ("v_proj", "fc1")}
PISSA, RSLORA = ({**TOWER, "model__vision__peft__kind": kind} for kind in ("pissa", "rslora"))
DORA = {"model__vision__peft__kind": "dora", "model__vision__peft__targets": ("o_proj", "down_proj")}
DORA_ALONE = {
    **LORA, **TOWER, "model__adapter__llm": "none", "model__adapter__vision": "none",
    **{f"model__{part}__peft__kind": "dora" for part in ("llm", "vision")},
}  # fmt: skip
MLP = {"model__neck__kind": "mlp", "model__neck__dim": 128}
SHAPE = {**PATCHES, **MLP}  # LLaVA's
TINY_GEMMA = {"head_dim": 8, "sliding_window": 4}


def of_pair(folder: Path, vision: str, llm: str, changes: dict[str, Any], **sizes: Any) -> Any:
    """A run of random weights of these families, and its model. `sizes`: of the LLM."""
    tower: dict[str, Any] = {**VIT, "model_type": vision}
    tower |= {"mlp_ratio": 2} if vision == "dinov2" else {"intermediate_size": 48}
    if vision == "siglip2_vision_model":
        del tower["image_size"]
        tower["num_patches"] = 16
    random = {"model__vision__source": None, "model__llm__source": None, "model__llm__tokenizer": "asset://tiny_llama"}
    text = {**LLM, "model_type": llm, **sizes}
    settings = {**random, "model__vision__config": tower, "model__llm__config": text, **changes}
    return tuned_run(folder, **settings)


CASES: dict[str, tuple[str, str, str, dict[str, Any], dict[str, Any]]] = {
    "merged, siglip, qwen2": ("merged", "siglip_vision_model", "qwen2", {**SHAPE, "model__vision__pool": 2}, {}),
    "merged, dinov3, phi3": ("merged", "dinov3_vit", "phi3", {**UNBIASED, **PATCHES, **DORA}, {}),
    "merged, clip, gemma2": ("merged", "clip_vision_model", "gemma2", UNBIASED, TINY_GEMMA),
    "lora, dinov2, gemma3": ("lora", "dinov2", "gemma3_text", {**UNBIASED, **PISSA}, TINY_GEMMA),
    "lora, siglip, olmo2": ("lora", "siglip_vision_model", "olmo2", {**BOTH, **LORA, **PISSA, **POOLER}, {}),
    "llava, clip, llama": ("llava", "clip_vision_model", "llama", {**SHAPE, **BOTH}, {"tie_word_embeddings": True}),
    "llava, siglip, qwen3": (
        "llava", "siglip_vision_model", "qwen3", {**SHAPE, **LORA, **RSLORA, "model__vision__blocks": 3},
        {"vocab_size": 800, "tie_word_embeddings": True},
    ),
    "lora, siglip, qwen3, dora": ("lora", "siglip_vision_model", "qwen3", {**PATCHES, **DORA_ALONE}, {}),
    "llava, dinov2, gemma": ("llava", "dinov2", "gemma", {**SHAPE, **UNBIASED}, {"head_dim": 8}),
}  # fmt: skip
QUICK = ("lora, siglip, olmo2", "merged, dinov3, phi3", "llava, siglip, qwen3")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_a_pair_is_exported_and_proven(name: str, tmp_path: Path, here: None) -> None:
    form, vision, llm, changes, sizes = CASES[name]
    if vision == "dinov2" and not is_transformers_at_least("5.24"):
        pytest.skip("its modules have other names")
    places, _ = of_pair(tmp_path, vision, llm, changes, **sizes)
    export(places.run, tmp_path / "out", form, proof_samples=1)
    proof = json.loads((tmp_path / "out" / "proof.json").read_text())
    assert proof["max_relative_error"] <= 1e-5 and proof["answers_equal"] == 1


TALKS = {
    "one image": ("<image>\nIs it red?",),
    "no image": ("Is it red?",),
    "system and images": ("Be brief.", "<image>\n<image>\nWhich is <image>\n?"),
}


def test_a_llavas_template_writes_the_prompts_of_the_run(tmp_path: Path) -> None:
    places, model = of_pair(tmp_path, "clip_vision_model", "llama", SHAPE)
    export(places.run, tmp_path / "out", "llava", proof_samples=None)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    network = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    tokenizer = load_tokenizer("asset://tiny_llama")
    names = ["<image>", "<|no_image|>", "<|with_image|>"]
    image, no_image, with_image = processor.tokenizer.convert_tokens_to_ids(names)
    assert network.config.image_token_id == image
    assert {image, no_image, with_image} <= set(network.generation_config.suppress_tokens)
    table = network.get_input_embeddings().weight
    torch.testing.assert_close(table[[no_image, with_image]], model.modality_embedding.weight, rtol=0, atol=0)
    ids = {IMAGE_TOKEN: image, TEXT_MODALITY_TOKEN: no_image, IMAGE_MODALITY_TOKEN: with_image}
    for name, texts in TALKS.items():
        roles = ["system", "user"][-len(texts) :]
        turns = [*zip(roles, texts, strict=True), ("assistant", "x")]
        images = ("a.png",) * sum(text.count("<image>") for text in texts)
        sample = Sample(id="0", images=images, turns=tuple(Turn(role=role, text=text) for role, text in turns))
        ours = encode_prompt(sample, tokenizer, "mmt", 1).input_ids.tolist()
        messages = [{"role": role, "content": content(text)} for role, text in zip(roles, texts, strict=True)]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert processor.tokenizer(text).input_ids == [ids.get(one, one) for one in ours], name
    messages = [{"role": role, "content": "red?"} for role in ("user", "assistant", "user")]
    with pytest.raises(Exception, match="this model answers one question"):
        processor.apply_chat_template(messages, add_generation_prompt=True)


def content(text: str) -> list[dict[str, str]]:
    given: list[dict[str, str]] = []
    for number, part in enumerate(text.split("<image>\n")):
        given += [{"type": "image"}] if number else []
        given += [{"type": "text", "text": part}] if part else []
    return given


def test_a_llavas_template_keeps_the_tokenizers_own(tmp_path: Path, here: None) -> None:
    own = {"model__llm__tokenizer": make_transformers(tmp_path / "chatml"), "data__template": "chat"}
    (tmp_path / "runs").mkdir()
    places, _ = of_pair(tmp_path / "runs", "siglip_vision_model", "llama", {**SHAPE, **own})
    export(places.run, tmp_path / "out", "llava", proof_samples=1)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    image, with_image = processor.tokenizer.convert_tokens_to_ids(["<image>", "<|with_image|>"])
    texts = ("<image>\nred?", "yes", "blue <image>\n?")
    roles = ("user", "assistant", "user")
    turns = tuple(Turn(role=role, text=text) for role, text in (*zip(roles, texts, strict=True), ("assistant", "no")))
    sample = Sample(id="0", images=("a.png", "b.png"), turns=turns)
    ours = encode_prompt(sample, load_tokenizer(own["model__llm__tokenizer"]), "chat", 1).input_ids.tolist()
    messages = [{"role": role, "content": content(text)} for role, text in zip(roles, texts, strict=True)]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    ids = {IMAGE_TOKEN: image, IMAGE_MODALITY_TOKEN: with_image}
    assert processor.tokenizer(text).input_ids == [ids.get(one, one) for one in ours]


@pytest.mark.parametrize(
    ("form", "vision", "llm", "changes", "said"),
    [
        ("llava", "clip_vision_model", "llama", PATCHES, "model.neck.kind: found 'bottleneck', expected 'mlp'"),
        ("llava", "clip_vision_model", "llama", MLP, "model.vision.tokens: found 'cls', expected 'patches'"),
        ("llava", "clip_vision_model", "gemma2", {**SHAPE, **UNBIASED}, "Gemma2ForCausalLM scales or caps its logits"),
        ("merged", "siglip2_vision_model", "llama", PATCHES, "a SigLIP 2 NaFlex ViT, which reads rows of patches"),
        ("mmt", "clip_vision_model", "qwen2", {}, "the run's LLM: found Qwen2, expected LLaMA"),
        ("mmt", "clip_vision_model", "llama", MLP, "model.neck.kind: found 'mlp', expected bottleneck or linear"),
        (
            "lora",
            "clip_vision_model",
            "llama",
            {**LORA, "model__llm__peft__kind": "dora"},
            "'dora' beside model.adapter.llm 'attention'",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    form: str, vision: str, llm: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    places, _ = of_pair(tmp_path, vision, llm, changes)
    with pytest.raises(InputError, match=said):
        export(places.run, tmp_path / "out", form, proof_samples=None)
    assert not (tmp_path / "out").exists()
