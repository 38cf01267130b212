"""What a recipe builds: the parameter counts of the paper, the trained set, dtypes, and the same random weights each
time."""

import logging

import pytest
import torch
from tiny_models import LLM, VISION, make_batch, mixed_batch, tiny_config

from tests.support.blip import blip_config
from vltrain.config.model.mmt import AdapterConfig, LLMConfig, MmtConfig, NeckConfig, PeftConfig, VisionConfig
from vltrain.errors import InputError
from vltrain.models import build
from vltrain.models.build import build_model, count_parameters
from vltrain.models.mmt import build as mmt_build
from vltrain.models.mmt.model import MultimodalModel

VIT_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


def paper_size(adapter: AdapterConfig, neck: NeckConfig | None = None) -> dict[str, tuple[int, int]]:
    config = MmtConfig(
        vision=VisionConfig(config=VIT_L_336, tap_every=4),
        llm=LLMConfig(config=LLAMA_2_7B, tokenizer="none"),
        adapter=adapter,
        neck=neck or NeckConfig(),
    )
    return count_parameters(build_model(config, device="meta"))


def num_trained(counts: dict[str, tuple[int, int]]) -> int:
    return sum(trained for _, trained in counts.values())


def test_trained_parameters_at_the_papers_size() -> None:
    counts = paper_size(AdapterConfig())
    assert num_trained(counts) == 4_559_872
    assert counts["neck"] == (659_584, 659_584) and counts["modality"] == (8192, 8192)
    assert counts["vision"][1] == counts["llm"][1] == 0
    assert counts["llm"][0] == 6_738_415_616  # LLaMA-2-7B as published
    assert num_trained(paper_size(AdapterConfig(down_groups=2))) == 3_314_688
    assert num_trained(paper_size(AdapterConfig(vision="both"))) == 4_559_872 + 614_784
    assert num_trained(paper_size(AdapterConfig(), NeckConfig(kind="linear"))) == 4_559_872 - 659_584 + 4_198_400


@pytest.mark.parametrize(
    "choice, parts",
    [
        ({}, set()),
        ({"vision": {"train": True}}, {"vision"}),
        ({"llm": {"train": True}}, {"llm"}),
        ({"tune": "full"}, {"vision", "llm"}),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_trained_is_what_gets_a_gradient(choice: dict[str, object], parts: set[str], tied: bool) -> None:
    """One backward over a row with text and images reaches exactly the trained parameters, every one of them."""
    choice["llm"] = {**choice.get("llm", {}), "config": {**LLM, "tie_word_embeddings": tied}}
    model = build_model(tiny_config(**choice))
    assert (model.llm.lm_head.weight is model.llm.model.embed_tokens.weight) == tied
    model(mixed_batch()).loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    dead = ("vision.clip.post_layernorm", "vision.clip.encoder.layers.4.")
    for name, parameter in model.named_parameters():
        expected = MultimodalModel.part_of(name) in {"adapter", "neck", "modality"} | parts and not name.startswith(
            dead
        )
        assert parameter.requires_grad == expected, name


def test_parts_cover_every_parameter_once() -> None:
    model = build_model(tiny_config(adapter={"vision": "both", "llm": "both"}, llm={"peft": PeftConfig(kind="lora")}))
    counts = count_parameters(model)
    assert tuple(counts) == MultimodalModel.PARTS
    assert sum(total for total, _ in counts.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert {part for part, (total, _) in counts.items() if total} == {
        "vision",
        "neck",
        "modality",
        "llm",
        "adapter",
        "peft",
    }
    assert MultimodalModel.part_of("llm.model.layers.0.input_layernorm.adapter.up_bias") == "adapter"
    assert MultimodalModel.part_of("llm.model.layers.0.input_layernorm.norm.weight") == "llm"
    assert MultimodalModel.part_of("llm.model.layers.0.self_attn.q_proj.lora_A.default.weight") == "peft"
    assert MultimodalModel.part_of("llm.model.layers.0.self_attn.q_proj.base_layer.weight") == "llm"
    assert MultimodalModel.part_of("modality_embedding.weight") == "modality"
    with pytest.raises(AssertionError, match="'optimiser.state' belongs to no part"):
        MultimodalModel.part_of("optimiser.state")


@pytest.mark.parametrize("tune", ["adapters", "full"])
def test_bf16_frozen_and_fp32_trained_weights_run_under_autocast(tune: str) -> None:
    exact = build_model(tiny_config(tune=tune))
    model = build_model(tiny_config(tune=tune), dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    batch = mixed_batch()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch)
    output.loss_sum.backward()
    assert output.loss_sum.dtype == output.segment_losses.dtype == torch.float32
    expected = exact(batch)
    expected.loss_sum.backward()
    assert abs(output.loss_sum.item() - expected.loss_sum.item()) < 0.01 * expected.loss_sum.item()
    ours, theirs = (torch.cat([p.grad.flatten() for p in m.parameters() if p.requires_grad]) for m in (model, exact))
    assert ours.dtype == torch.float32 and torch.cosine_similarity(ours, theirs, dim=0) > 0.99


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = build_model(tiny_config())
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = build_model(tiny_config())
    assert torch.equal(torch.get_rng_state(), before), "building a model must not move the caller's generator"
    other = build_model(tiny_config(seed=1))
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
    assert not torch.equal(first.neck.down.weight, other.neck.down.weight)
    assert not torch.equal(
        first.llm.model.layers[0].self_attn.q_proj.weight, other.llm.model.layers[0].self_attn.q_proj.weight
    )
    assert not torch.equal(first.vision.clip.embeddings.class_embedding, other.vision.clip.embeddings.class_embedding)


def test_parts_draw_their_weights_independently() -> None:
    """A deeper ViT leaves the LLM, the neck and the modality embedding as they were."""
    first = build_model(tiny_config())
    second = build_model(tiny_config(vision={"config": {**VISION, "num_hidden_layers": 6}}))
    for name, weight in first.state_dict().items():
        if not name.startswith("vision.clip"):
            assert torch.equal(weight, second.state_dict()[name]), name


def test_an_adapter_leaves_the_networks_function_as_it_was() -> None:
    batch = make_batch([(7, [0]), (5, [])], num_images=1)
    with_adapters = build_model(tiny_config(adapter={"vision": "both", "llm": "both"}))(batch).loss_sum
    without = build_model(tiny_config(adapter={"vision": "none", "llm": "none"}))(batch).loss_sum
    torch.testing.assert_close(with_adapters, without, rtol=1e-6, atol=0)


def test_user_mistakes_are_named() -> None:
    with pytest.raises(
        InputError,
        match="model.vision.config.hiden_size: CLIPVisionConfig has no such setting; did you mean 'hidden_size'",
    ):
        build_model(tiny_config(vision={"config": {**VISION, "hiden_size": 3}}))
    with pytest.raises(InputError, match="model.adapter.groups: found 3, expected a divisor of the width 32"):
        build_model(tiny_config(adapter={"dim": 6, "groups": 3, "vision": "none"}))


def test_a_wrong_trained_set_does_not_get_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """If naming and modules ever disagree about what is an adapter, building fails."""

    part_of = MultimodalModel.part_of
    monkeypatch.setattr(MultimodalModel, "part_of", lambda self, name: "llm" if ".adapter." in name else part_of(name))
    with pytest.raises(AssertionError, match="trained but should not be, or the other way round.*adapter.down_weight"):
        build_model(tiny_config())


@pytest.mark.parametrize("model", [tiny_config(), blip_config("llama").model], ids=["mmt", "instructblip"])
def test_kernels_are_logged_by_the_model_and_not_by_its_outline(
    model: MmtConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vltrain")
    build.outline_model(model, "cpu", torch.float32)
    assert not caplog.messages
    build_model(model)
    attention, kernels = caplog.messages
    assert attention.startswith(
        ("attention of packed rows: sdpa (", "attention of packed rows: tiled (")
    ) and kernels.startswith("norms, rotary embedding and SwiGLU of the LLM: torch")


def test_attention_is_chosen_for_the_device_of_the_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is made on the CPU and moved: what runs it is a GPU's to say. So is the dtype of products, not that of
    weights."""
    asked = []
    monkeypatch.setattr(
        mmt_build,
        "choose_attention",
        lambda requested, config, device, dtype, log: asked.append((str(device), dtype)) or "sdpa",
    )
    build.build_model(tiny_config(bits=32), dtype=torch.bfloat16, runs_on="cuda:0")
    build.build_model(tiny_config())
    build.outline_model(tiny_config(), "cuda:0", torch.bfloat16)
    assert asked == [
        ("cuda:0", torch.bfloat16),
        ("cpu", torch.float32),
        ("meta", torch.float32),  # names and shapes are checked with it
        ("cuda:0", torch.bfloat16),
    ]
