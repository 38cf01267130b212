"""Another family of LLMs, or of vision towers, is one value and one line; visual tokens are a choice of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import LLM, VISION, make_batch, randomise_adapters, tiny_config
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vltrain.config.model.mmt import PeftConfig
from vltrain.errors import InputError
from vltrain.models.backbones.clip import CLIP
from vltrain.models.backbones.family import Language, Tower
from vltrain.models.backbones.llama import LLAMA
from vltrain.models.backbones.table import LANGUAGES, TOWERS
from vltrain.models.build import build_model, outline_model
from vltrain.models.mmt.merge import merge_adapters
from vltrain.models.mmt.visual_tokens import Patches

QWEN2 = Language(
    title="Qwen2",
    model_types=("qwen2",),
    config=Qwen2Config,
    network=Qwen2ForCausalLM,
    norms=LLAMA.norms,
    readers=LLAMA.readers,
    writers=LLAMA.writers,
    targets=LLAMA.targets,
)
SIGLIP = Tower(
    title="SigLIP ViT",
    model_types=("siglip_vision_model",),
    config=SiglipVisionConfig,
    network=SiglipVisionModel,
    norms=CLIP.norms,
    readers=CLIP.readers,
    writers=CLIP.writers,
    before=("embeddings",),
    after=("post_layernorm", "head"),
    has_cls=False,
    pool=lambda siglip, states: siglip.head(siglip.post_layernorm(states)),
    whole={"siglip": SiglipConfig},
)
PIXELS = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PATCHES = {"config": {**VISION, "patch_size": 8}, "tokens": "patches", "tap_every": 4}
OF_SIGLIP = {**PATCHES, "config": {**PATCHES["config"], "model_type": "siglip_vision_model"}}
OF_QWEN2 = {"config": {**LLM, "model_type": "qwen2"}}


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LANGUAGES, "qwen2", QWEN2)  # the lines
    monkeypatch.setitem(TOWERS, "siglip", SIGLIP)


def gradients(model: Any, batches: list[Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Of the sum of the losses of these batches."""
    model.zero_grad()
    losses = [model(batch).loss_sum for batch in batches]
    torch.stack(losses).sum().backward()
    found = {
        name: one.grad.clone() for name, one in model.named_parameters() if one.requires_grad and one.grad is not None
    }
    return float(torch.stack(losses).sum().detach()), found


@pytest.mark.parametrize(
    ("changes", "visual_tokens"),
    [
        ({"llm": OF_QWEN2}, 2),
        ({"llm": {**OF_QWEN2, "peft": PeftConfig(kind="lora")}, "adapter": {"vision": "none", "llm": "none"}}, 2),
        ({"llm": OF_QWEN2, "tune": "full"}, 2),
        ({"vision": {**OF_SIGLIP, "pool": 2}}, 4),
        ({"vision": {**OF_SIGLIP, "pool": 4}, "tune": "full", "llm": OF_QWEN2}, 1),
        ({"vision": PATCHES, "adapter": {"vision": "both", "llm": "both"}}, 16),
        ({"vision": {**PATCHES, "tokens": "pooler"}}, 1),
        ({"vision": {**OF_SIGLIP, "tokens": "pooler"}, "tune": "full"}, 1),
    ],
    ids=[
        "qwen2",
        "qwen2, lora",
        "qwen2, full",
        "siglip",
        "siglip and qwen2, full",
        "clip patches",
        "clip pooler",
        "siglip pooler, full",
    ],
)
def test_a_packed_row_has_the_loss_and_gradients_of_its_samples(
    changes: dict[str, Any], visual_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_models, "VISUAL_TOKENS", visual_tokens)
    model = build_model(tiny_config(**changes))
    assert model.visual_tokens == visual_tokens
    randomise_adapters(model)
    packed = make_batch([(7, [0]), (5, []), (9, [1, 0])], num_images=2)
    alone, start = [], 0
    for length, shown in zip(packed.segment_lengths.tolist(), ([0], [], [1, 0]), strict=True):
        own = slice(start, start + length)
        start += length
        kept = sorted(set(shown))
        alone.append(
            replace(
                packed,
                input_ids=packed.input_ids[own],
                labels=packed.labels[own],
                position_ids=packed.position_ids[own],
                segment_lengths=torch.tensor([length]),
                pixels=packed.pixels[kept],
                image_slots=torch.tensor([kept.index(one) for one in shown], dtype=torch.int64),
                num_label_tokens=int((packed.labels[own] != -100).sum()),
            )
        )
    loss, together = gradients(model, [packed])
    other, apart = gradients(model, alone)
    assert loss == pytest.approx(other, rel=1e-5)
    assert together.keys() == apart.keys() and together
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, apart[name], rtol=1e-3, atol=1e-5)


def test_weights_of_a_family_are_read_from_its_folder_and_refused_without_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    theirs = Qwen2ForCausalLM(Qwen2Config(**LLM)).eval()
    theirs.save_pretrained(tmp_path / "qwen")
    config = tiny_config(llm={"config": {}, "source": str(tmp_path / "qwen"), "tokenizer": "none"})
    outline_model(config)
    ours = build_model(config).eval()
    ids = torch.randint(LLM["vocab_size"], (1, 9), generator=torch.Generator().manual_seed(1))
    expected = theirs.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(ours.llm.model(input_ids=ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    monkeypatch.delitem(LANGUAGES, "qwen2")
    with pytest.raises(InputError, match="is a model of type 'qwen2', expected 'llama'"):
        build_model(config)


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("config", [PATCHES["config"], OF_SIGLIP["config"]], ids=["clip", "siglip"])
def test_patches_are_transformers_hidden_states_and_their_means(config: dict[str, Any], pool: int) -> None:
    model = build_model(tiny_config(vision={**PATCHES, "config": config, "pool": pool}, adapter={"vision": "none"}))
    tokens: Patches = model.vision
    pixels = tokens.normalise(PIXELS)
    states = tokens.clip(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, -16:]
    grid = states.transpose(1, 2).unflatten(2, (4, 4))
    expected = torch.nn.functional.avg_pool2d(grid, pool).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens(PIXELS), expected, rtol=1e-5, atol=1e-5)
    assert model.visual_tokens == (4 // pool) ** 2


@pytest.mark.parametrize("config", [PATCHES["config"], OF_SIGLIP["config"]], ids=["clip", "siglip"])
def test_the_pooler_is_transformers_pooler_output(config: dict[str, Any]) -> None:
    model = build_model(
        tiny_config(vision={**PATCHES, "config": config, "tokens": "pooler"}, adapter={"vision": "none"})
    )
    tokens = model.vision
    expected = tokens.clip(pixel_values=tokens.normalise(PIXELS)).pooler_output[:, None]
    torch.testing.assert_close(tokens(PIXELS), expected, rtol=1e-5, atol=1e-5)
    assert model.visual_tokens == 1


def test_a_tower_without_pooler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOWERS, "siglip", replace(SIGLIP, pool=None))
    with pytest.raises(InputError, match="found 'pooler', but a SigLIP ViT has no pooler; take patches"):
        build_model(tiny_config(vision={**OF_SIGLIP, "tokens": "pooler"}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision": {**OF_SIGLIP, "tokens": "cls"}}, "a SigLIP ViT has no .cls."),
        ({"vision": {**PATCHES, "pool": 3}}, "model.vision.pool: found 3, expected a divisor of the 4 patches"),
        ({"vision": {**PATCHES, "blocks": 6}}, "model.vision.blocks: found 6, expected at most the ViT's 5"),
        ({"llm": {**OF_QWEN2, "peft": PeftConfig(kind="adaption_prompt")}}, "peft does not know in a Qwen2; take lora"),
        ({"llm": {"config": {**LLM, "model_type": "gpt9"}}}, "found 'gpt9', expected one of llama, qwen2"),
    ],
)
def test_what_a_family_lacks_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        build_model(tiny_config(**changes))


def test_adapters_are_merged_into_another_familys_layers_unless_its_config_can_hold_no_bias() -> None:
    model = build_model(tiny_config(llm=OF_QWEN2, adapter={"bias": False, "llm": "both"}))
    randomise_adapters(model)
    batch = make_batch([(7, [0]), (5, [])], num_images=1)
    before = model(batch).loss_sum
    merge_adapters(model.eval())
    torch.testing.assert_close(model(batch).loss_sum, before, rtol=1e-4, atol=1e-4)
    assert type(model.llm) is Qwen2ForCausalLM
    with_biases = build_model(tiny_config(llm=OF_QWEN2))
    with pytest.raises(InputError, match="config of a Qwen2 has no switch for biases"):
        merge_adapters(with_biases)
