"""Every family of LLMs and of vision towers: packed exactly, read and run as transformers does, merged; what one lacks
is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import LLM, make_batch, randomise_adapters, tiny_config
from transformers import AutoModel, AutoModelForCausalLM

from vltrain.config.model.mmt import LOW_RANK, PeftConfig
from vltrain.errors import InputError
from vltrain.models.backbones.siglip import SIGLIP
from vltrain.models.backbones.table import LANGUAGES, TOWERS
from vltrain.models.build import build_model, outline_model
from vltrain.models.mmt.merge import merge_adapters
from vltrain.models.pretrained.readers import is_transformers_at_least

PIXELS = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}
SQUARE = {**SMALL, "intermediate_size": 40, "image_size": 32}
TEXT = {**LLM, "num_hidden_layers": 2}
# A tiny tower and LLM of each family, with what tells it from the others.
VITS: dict[str, dict[str, Any]] = {
    "clip_vision_model": SQUARE,
    "siglip_vision_model": SQUARE,
    "siglip2_vision_model": {**SMALL, "intermediate_size": 40, "num_patches": 16},
    "dinov2": {**SMALL, "mlp_ratio": 2, "image_size": 32, "layerscale_value": 0.5},
    "dinov2_with_registers": {**SMALL, "mlp_ratio": 2, "image_size": 48, "num_register_tokens": 3},
    "dinov3_vit": {**SQUARE, "num_register_tokens": 2, "use_gated_mlp": True},
}
LLMS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "smollm3": {"pad_token_id": 0, "no_rope_layer_interval": 2},
    "phi3": {"pad_token_id": 0, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
    }},
    "olmo2": {"pad_token_id": 0},
    "gemma": {"head_dim": 8},
    "mistral": {"sliding_window": 4},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip
DINOV2 = [name for name in VITS if name.startswith("dinov2")]
NEEDS_NEWER = pytest.mark.skipif(not is_transformers_at_least("5.24"), reason="DINOv2's modules have other names")


def vit(model_type: str, **more: Any) -> dict[str, Any]:
    size = {"image_size": 32} if "dino" in model_type else {}
    return {
        "config": {"model_type": model_type, **VITS[model_type]},
        "tokens": "patches",
        "tap_every": 3,
        **size,
        **more,
    }


def llm(model_type: str, **more: Any) -> dict[str, Any]:
    return {"config": {"model_type": model_type, **TEXT, **LLMS[model_type]}, **more}


def slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow)


def all_vits() -> list[Any]:
    return [pytest.param(name, marks=NEEDS_NEWER if name in DINOV2 else ()) for name in VITS]


def gradients(model: Any, batches: list[Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of the sum of the losses of these batches, of every trained parameter."""
    model.zero_grad()
    loss = torch.stack([model(batch).loss_sum for batch in batches]).sum()
    loss.backward()
    trained = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    missing = [name for name, gradient in trained.items() if gradient is None]
    assert not missing, f"without a gradient: {missing}"
    return loss.detach(), {name: gradient.clone() for name, gradient in trained.items() if gradient is not None}


def apart(packed: Any, shown: list[list[int]]) -> list[Any]:
    """A row for each segment."""
    rows, start = [], 0
    for length, images in zip(packed.segment_lengths.tolist(), shown, strict=True):
        own = slice(start, start + length)
        start += length
        kept = sorted(set(images))
        rows.append(
            replace(
                packed,
                input_ids=packed.input_ids[own],
                labels=packed.labels[own],
                position_ids=packed.position_ids[own],
                segment_lengths=torch.tensor([length]),
                pixels=packed.pixels[kept],
                image_slots=torch.tensor([kept.index(one) for one in images], dtype=torch.int64),
                num_label_tokens=int((packed.labels[own] != -100).sum()),
            )
        )
    return rows


BOTH = {"vision": "both", "llm": "both"}
ROWS: dict[str, tuple[dict[str, Any], int]] = {
    **{name: ({"llm": llm(name), "adapter": {"llm": "both"}}, 2) for name in LLMS},
    "qwen2, full": ({"llm": llm("qwen2"), "tune": "full"}, 2),
    "phi3, lora": ({"llm": llm("phi3", peft=PeftConfig(kind="lora", targets=("qkv_proj", "down_proj")))}, 2),
    "olmo2, dora": ({"llm": llm("olmo2", peft=PeftConfig(kind="dora")), "adapter": {"llm": "both"}}, 2),
    "gemma, pissa": ({"llm": llm("gemma", peft=PeftConfig(kind="pissa", targets=("o_proj", "up_proj")))}, 2),
    "olmo2 and dinov3, 4 bits": (
        {"llm": llm("olmo2"), "vision": vit("dinov3_vit", pool=4), "adapter": BOTH, "bits": 4},
        1,
    ),
    "olmo2, routed": ({"llm": llm("olmo2"), "adapter": {"kind": "router", "vision_kind": "repadapter", **BOTH}}, 2),
    "siglip": ({"vision": vit("siglip_vision_model", pool=2), "adapter": BOTH}, 4),
    "siglip pooler, full": ({"vision": vit("siglip_vision_model", tokens="pooler"), "tune": "full"}, 1),
    "siglip2, full": ({"vision": vit("siglip2_vision_model", pool=4), "tune": "full"}, 1),
    "clip pooler": ({"vision": vit("clip_vision_model", tokens="pooler"), "adapter": BOTH}, 1),
    "dinov2 cls, full": ({"vision": vit("dinov2", tokens="cls"), "tune": "full"}, 1),
    "dinov2 with registers": ({"vision": vit("dinov2_with_registers"), "adapter": BOTH}, 16),
    "dinov3": ({"vision": vit("dinov3_vit", pool=2), "adapter": BOTH}, 4),
    "dinov3 cls, full, and gemma": (
        {"vision": vit("dinov3_vit", tokens="cls", tap_every=1), "tune": "full", "llm": llm("gemma")},
        3,
    ),
}


# Attention of most families alone: tests/models/test_packed_decoder.py.
SLOW_ROWS = {
    "llama",
    "qwen2",
    "qwen3",
    "smollm3",
    "gemma",
    "mistral",
    "gemma2",
    "siglip",
    "clip pooler",
    "siglip2, full",
}


def _row(name: str) -> Any:
    needed = [NEEDS_NEWER] if "dinov2" in name else []
    return pytest.param(name, marks=[*needed, *([pytest.mark.slow] if name in SLOW_ROWS else [])])


@pytest.mark.parametrize("name", [_row(name) for name in ROWS])
def test_a_packed_row_has_the_loss_and_gradients_of_its_samples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, visual_tokens = ROWS[name]
    monkeypatch.setattr(tiny_models, "VISUAL_TOKENS", visual_tokens)
    model = build_model(tiny_config(**changes))
    assert model.visual_tokens == visual_tokens
    randomise_adapters(model)
    packed = make_batch([(7, [0]), (5, []), (9, [1, 0])], num_images=2)
    loss, together = gradients(model, [packed])
    other, alone = gradients(model, apart(packed, [[0], [], [1, 0]]))
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=0)
    off, size = (torch.stack([one.square().sum() for one in ones]).sum().sqrt() for ones in (
        [gradient - alone[name] for name, gradient in together.items()], alone.values(),
    ))  # fmt: skip
    assert off <= 1e-5 * size


@pytest.mark.parametrize("kind", LOW_RANK)
def test_every_kind_of_lora_starts_as_the_network_and_merges_into_it(kind: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rank": 4, "targets": ("q_proj", "down_proj")}
    torch.manual_seed(0)
    model, plain = (
        build_model(tiny_config(llm=llm("qwen2", **peft), adapter={"llm": "none"}, seed=3))
        for peft in ({"peft": PeftConfig(kind=kind, **settings)}, {})  # pyright: ignore[reportArgumentType]
    )
    batch = make_batch([(7, [0]), (5, [])], num_images=1)
    torch.testing.assert_close(model(batch).loss_sum, plain(batch).loss_sum, rtol=1e-5, atol=1e-5)
    _, found = gradients(model, [batch])
    assert len([name for name in found if "lora_" in name]) == 2 * 2 * (3 if kind == "dora" else 2)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data += 0.5 * torch.randn_like(parameter)
    layer = model.llm.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == (16 / 4**0.5 if kind == "rslora" else 16 / 4)
    loss = model.eval()(batch).loss_sum
    assert abs(loss - plain(batch).loss_sum) > 0.01
    merge_adapters(model)
    assert type(model.llm.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    torch.testing.assert_close(model(batch).loss_sum, loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LLMS)
def test_an_llm_is_read_from_its_folder_and_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    [family] = [one for one in LANGUAGES.values() if one.model_types[0] == name]
    torch.manual_seed(0)
    theirs = family.network(family.config(**TEXT, **LLMS[name])).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    config = tiny_config(llm={"config": {}, "source": str(tmp_path), "tokenizer": "none"}, adapter={"llm": "both"})
    outline_model(config)
    ours = build_model(config).eval()
    ids = torch.randint(LLM["vocab_size"], (1, 19), generator=torch.Generator().manual_seed(1))
    states = ours.llm.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(ours.llm.lm_head(states), theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", all_vits())
def test_a_tower_is_read_from_its_folder_and_its_tokens_are_transformers_states(name: str, tmp_path: Path) -> None:
    [family] = [one for one in TOWERS.values() if name in one.model_types]
    torch.manual_seed(0)
    theirs = family.network(family.config(**VITS[name])).eval()
    theirs.save_pretrained(tmp_path)
    more = {"image_size": 32} if family.any_size else {}

    def tokens(**settings: Any) -> Any:
        vision = {"config": {}, "source": str(tmp_path), **more, **settings}
        return build_model(tiny_config(vision=vision, adapter={"vision": "none"})).vision

    ours = tokens(tokens="patches", pool=2)
    pixels = ours.normalise(PIXELS)
    given = {"pixel_values": pixels}
    if name == "siglip2_vision_model":
        rows = torch.nn.functional.unfold(pixels, 8, stride=8).unflatten(1, (3, 64)).permute(0, 3, 2, 1).flatten(2)
        shapes = torch.full((3, 2), 4)
        given = {"pixel_values": rows, "spatial_shapes": shapes, "pixel_attention_mask": torch.ones(3, 16)}
    found = theirs(**given, output_hidden_states=True)
    grid = found.hidden_states[-2][:, -16:].transpose(1, 2).unflatten(2, (4, 4))
    pooled = torch.nn.functional.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours(PIXELS), pooled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens(tokens="pooler")(PIXELS), found.pooler_output[:, None], rtol=1e-5, atol=1e-5)
    if family.has_cls:
        taps = torch.stack([state[:, 0] for state in found.hidden_states[2::2]], dim=1)
        torch.testing.assert_close(tokens(tokens="cls", tap_every=2)(PIXELS), taps, rtol=1e-5, atol=1e-5)


def test_what_patches_leave_of_an_image_at_its_edge_is_not_read() -> None:
    """As SigLIP's 384 pixels in patches of 14."""
    vision = vit("siglip_vision_model")
    vision["config"] = {**vision["config"], "image_size": 36}
    tokens = build_model(tiny_config(vision=vision)).vision
    pixels = torch.randint(256, (1, 3, 36, 36), dtype=torch.uint8)
    assert tokens.num_tokens == 16 and tokens(pixels).shape == (1, 16, 24)


def test_a_dinov3_sees_the_same_in_training(tmp_path: Path) -> None:
    tokens = build_model(tiny_config(vision=vit("dinov3_vit"))).vision
    assert tokens.training and tokens.clip.config.pos_embed_rescale == 2.0
    torch.testing.assert_close(tokens(PIXELS), tokens.eval()(PIXELS), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision": vit("siglip_vision_model", tokens="cls")}, "a SigLIP ViT has no .cls."),
        ({"vision": vit("clip_vision_model", pool=3)}, "model.vision.pool: found 3, expected a divisor of the 4 patch"),
        ({"vision": vit("clip_vision_model", blocks=6)}, "model.vision.blocks: found 6, expected at most the ViT's 3"),
        ({"vision": vit("clip_vision_model", image_size=64)}, "image_size: found 64, expected null or 32: the positio"),
        ({"vision": vit("dinov3_vit") | {"image_size": 36}}, "image_size: 36 pixels, expected a multiple of a patc"),
        ({"vision": {"config": {"model_type": "dinov2", "use_swiglu_ffn": True}}}, "use_swiglu_ffn: found true, whose"),
        ({"llm": llm("qwen2", peft=PeftConfig(kind="adaption_prompt"))}, "peft does not know in a Qwen2; take lora"),
        ({"llm": llm("phi3", peft=PeftConfig(kind="lora"))}, "a Phi-3's blocks have no linear layer 'q_proj'"),
        ({"llm": {"config": {**LLM, "model_type": "gpt9"}}}, "found 'gpt9', expected one of llama, qwen2"),
        ({"llm": {"config": {**LLM, "model_type": "gemma", "use_bidirectional_attention": True}}}, "use_bidirect"),
    ],
)  # fmt: skip
def test_what_a_family_lacks_is_refused(changes: dict[str, Any], said: str) -> None:
    if "swiglu" in said and not is_transformers_at_least("5.24"):
        said = "needs transformers 5.24 or newer"
    with pytest.raises(InputError, match=said):
        build_model(tiny_config(**changes))


def test_a_tower_without_pooler_is_refused() -> None:
    vision = vit("siglip_vision_model", tokens="pooler")
    vision["config"] = {**vision["config"], "vision_use_head": False}
    with pytest.raises(InputError, match="found 'pooler', but a SigLIP ViT has no pooler; take patches"):
        build_model(tiny_config(vision=vision))
    assert build_model(tiny_config(vision={**vision, "tokens": "patches"})).visual_tokens == 16


def test_a_family_that_the_installed_transformers_has_under_other_names_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(TOWERS, "siglip", replace(SIGLIP, since="99.1"))
    with pytest.raises(InputError, match="a SigLIP ViT needs transformers 99.1 or newer, found "):
        build_model(tiny_config(vision=vit("siglip_vision_model")))


# Where a family's layers can hold the constant of an adapter with biases.
HOLDS = {"llama": "both", "smollm3": "both"} | dict.fromkeys(
    ("qwen2", "qwen3", "olmo2", "gemma", "gemma2", "gemma3_text"), "attention"
)


@pytest.mark.parametrize("name", [name if name in ("qwen2", "phi3", "gemma3_text") else slow(name) for name in LLMS])
def test_adapters_are_merged_into_any_familys_layers(name: str, tmp_path: Path) -> None:
    adapter = {"llm": HOLDS.get(name, "both"), "bias": name in HOLDS, "vision": "none"}
    merge_and_compare({"llm": llm(name), "adapter": adapter}, tmp_path)
    if HOLDS.get(name) != "both":
        with pytest.raises(InputError, match="has no switch for biases of the ffn's linear layers"):
            merge_adapters(build_model(tiny_config(llm=llm(name), adapter={"llm": "ffn"})))


@pytest.mark.parametrize("name", [slow("clip_vision_model"), slow("siglip2_vision_model"), *all_vits()[3:]])
def test_adapters_are_merged_into_any_towers_layers(name: str, tmp_path: Path) -> None:
    merge_and_compare({"vision": vit(name, pool=2), "adapter": {"vision": "both", "llm": "none"}}, tmp_path, 4)


def merge_and_compare(changes: dict[str, Any], folder: Path, visual_tokens: int = 2) -> None:
    """Merged, saved and read by transformers, tower and LLM compute what they did with adapters."""
    before, tiny_models.VISUAL_TOKENS = tiny_models.VISUAL_TOKENS, visual_tokens
    batch = make_batch([(7, [0]), (5, [])], num_images=1)
    tiny_models.VISUAL_TOKENS = before
    model = build_model(tiny_config(**changes)).eval()
    randomise_adapters(model)
    loss, seen = model(batch).loss_sum, model.vision(PIXELS)
    merge_adapters(model)
    torch.testing.assert_close(model(batch).loss_sum, loss, rtol=1e-5, atol=1e-5)
    model.vision.clip.save_pretrained(folder / "vision")
    model.llm.save_pretrained(folder / "llm")
    ids = torch.arange(12)[None]
    logits = AutoModelForCausalLM.from_pretrained(folder / "llm")(input_ids=ids).logits
    ours = model.llm.lm_head(model.llm.model(input_ids=ids).last_hidden_state)
    torch.testing.assert_close(logits, ours, rtol=1e-5, atol=1e-5)
    again = AutoModel.from_pretrained(folder / "vision")
    assert {name: one.shape for name, one in again.state_dict().items()} == {
        name: one.shape for name, one in model.vision.clip.state_dict().items()
    }
    model.vision.clip = again
    torch.testing.assert_close(model.vision(PIXELS), seen, rtol=1e-4, atol=1e-4)
