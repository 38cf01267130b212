"""Routed adapters in the LLM: the decision token alone decides, in packed rows, in generation and in recomputed
blocks."""

import dataclasses

import pytest
import torch
from test_multimodal import alone, gradients
from tiny_models import make_batch, mixed_batch, randomise_adapters, tiny_config

from vltrain.config.model.mmt import AdapterConfig
from vltrain.models.adapters import ADAPTERS, is_routed
from vltrain.models.build import build_model
from vltrain.models.mmt.model import MultimodalModel
from vltrain.schema import IMAGE_MODALITY_TOKEN, TEXT_MODALITY_TOKEN

ROUTED = [kind for kind in ADAPTERS if ADAPTERS[kind].routed]


def build(kind: str) -> MultimodalModel:
    sizes = {} if "dim" in ADAPTERS[kind].settings else {"dim": AdapterConfig().dim}
    model = build_model(tiny_config(adapter={"kind": kind, "llm": "both", "temperature": 0.5, **sizes}))
    randomise_adapters(model)
    return model


@pytest.mark.parametrize("kind", ROUTED)
def test_packed_row_equals_its_samples_one_at_a_time(kind: str) -> None:
    model = build(kind).double()
    batch = mixed_batch()
    packed = model(batch)
    packed.loss_sum.backward()
    expected = gradients(model)
    model.zero_grad()
    losses = [model(row).loss_sum for row in alone(batch)]
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(packed.segment_losses, torch.stack(losses).detach(), rtol=1e-6, atol=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_modality_matters_through_the_router_alone() -> None:
    """No other token attends to u_m: with equal experts, which makes routing moot, the modality has no effect at
    all."""
    model = build("router")
    batch = make_batch([(9, [])], num_images=0)
    other = dataclasses.replace(batch, input_ids=batch.input_ids.clone())
    assert other.input_ids[0] == TEXT_MODALITY_TOKEN
    other.input_ids[0] = IMAGE_MODALITY_TOKEN
    assert abs(model(batch).loss_sum.item() - model(other).loss_sum.item()) > 1e-3
    for name, parameter in model.named_parameters():
        if name.endswith(("adapter.up_weight", "adapter.up_bias")):
            parameter.data[1] = parameter.data[0]
    torch.testing.assert_close(model(batch).loss_sum, model(other).loss_sum, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ROUTED)
def test_generation_routes_as_training_does(kind: str) -> None:
    """A batch of prompts without their modality tokens gives the packed row's hidden states."""
    model = build(kind).eval()
    batch = make_batch([(9, [0]), (11, []), (9, [0])], num_images=1)
    embeds = model.embed(batch.input_ids, model.encode_images(batch.pixels), batch.image_slots)
    lengths = batch.segment_lengths
    owner = torch.repeat_interleave(torch.arange(3), lengths)
    packed = model._hidden_states(embeds, batch.position_ids, lengths, owner).split(lengths.tolist())
    model.decide_routing()
    segments = [segment[1:] for segment in embeds.split(lengths.tolist())]
    for rows, modality in (([0, 2], [1, 1]), ([1], [0])):
        states = model.language_model(
            torch.stack([segments[row] for row in rows]), torch.tensor(modality), use_cache=False
        ).last_hidden_state
        for row, state in zip(rows, states, strict=True):
            torch.testing.assert_close(state, packed[row][1:], rtol=1e-4, atol=1e-5)


def test_recomputed_blocks_are_routed_as_at_first() -> None:
    """Two forwards before one backward, with checkpointing: each block sees the routing of its own row again."""
    rows = [
        make_batch([(7, [0]), (5, [])], num_images=1),
        make_batch([(4, []), (3, []), (6, [0])], num_images=1, seed=1),
    ]
    results = []
    for checkpointing in (False, True):
        model = build_model(
            tiny_config(adapter={"kind": "router", "llm": "both", "temperature": 0.5}),
            activation_checkpointing=checkpointing,
        )
        randomise_adapters(model)
        torch.stack([model(row).loss_sum for row in rows]).sum().backward()
        results.append(gradients(model))
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-5, atol=1e-7)


def test_decisions_follow_the_weights() -> None:
    model = build("router").eval()
    model.decide_routing()
    before = [weights.clone() for weights in model.routing.decisions.values()]
    assert len(before) == 6 and all(weights.shape == (2, 1, 2) for weights in before)
    randomise_adapters(model)
    model.decide_routing()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.routing.decisions.values(), strict=True))


def test_a_router_in_the_vit_routes_each_token_by_itself() -> None:
    """An image's features do not depend on its neighbours in the batch."""
    model = build("router").eval()
    pixels = make_batch([(3, [])], num_images=3).pixels
    together = model.vision(pixels)
    for number in range(3):
        torch.testing.assert_close(model.vision(pixels[number : number + 1])[0], together[number], rtol=1e-5, atol=1e-5)


def test_an_unrouted_call_is_caught_and_unrouted_kinds_need_none() -> None:
    model = build("router").eval()
    with pytest.raises(AssertionError, match="no routing set"):
        model.llm.model(inputs_embeds=torch.zeros(1, 3, 32))
    broken = mixed_batch()
    broken.input_ids[0] = 5
    with pytest.raises(AssertionError, match="starts with no modality token"):
        model(broken)
    config = tiny_config()
    assert build_model(config).routing is None and not is_routed(config.adapter)
    assert not is_routed(tiny_config(adapter={"kind": "router", "llm": "none"}).adapter)
    plain = build_model(config).eval()
    plain.decide_routing()
    embeds = torch.randn(2, 3, 32)
    assert torch.equal(
        plain.language_model(embeds, torch.zeros(2, dtype=torch.int64)).last_hidden_state,
        plain.llm.model(inputs_embeds=embeds).last_hidden_state,
    )


@pytest.mark.parametrize("kind", ROUTED)
def test_fillers_reach_the_routers_too(kind: str) -> None:
    model = build(kind)
    model(make_batch([(1, [])], num_images=0, is_filler=True, labels=False)).loss_sum.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith(("vision.", "neck.")):
            assert parameter.grad is not None and not parameter.grad.any(), name
