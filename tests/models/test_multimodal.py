"""The whole forward: packed rows equal their samples one at a time, in loss and in every gradient; fillers;
checkpointing."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tiny_models import LLM, VISUAL_TOKENS, make_batch, mixed_batch, randomise_adapters, tiny_config

from vltrain.batch import Batch
from vltrain.models.backbones.llm import packed_hidden_states
from vltrain.models.build import build_model
from vltrain.models.mmt.model import MultimodalModel
from vltrain.schema import IGNORE_INDEX, IMAGE_MODALITY_TOKEN, IMAGE_TOKEN, TEXT_MODALITY_TOKEN

VISION_SIDE = ("vision.", "neck.")


def build(**choice: object) -> MultimodalModel:
    model = build_model(tiny_config(**choice))
    randomise_adapters(model)
    return model


def alone(batch: Batch) -> list[Batch]:
    """Each segment of a row as a row of its own, with its own copies of its images."""
    rows = []
    first = first_run = 0
    for number, length in enumerate(batch.segment_lengths.tolist()):
        part = slice(first, first + length)
        num_runs = int((batch.input_ids[part] == IMAGE_TOKEN).sum()) // VISUAL_TOKENS
        slots = batch.image_slots[first_run : first_run + num_runs]
        labels = batch.labels[part]
        rows.append(
            Batch(
                input_ids=batch.input_ids[part],
                labels=labels,
                position_ids=torch.arange(length),
                segment_lengths=torch.tensor([length]),
                pixels=batch.pixels[slots],
                image_slots=torch.arange(num_runs),
                sample_ids=(batch.sample_ids[number],),
                num_label_tokens=int((labels != IGNORE_INDEX).sum()),
            )
        )
        first, first_run = first + length, first_run + num_runs
    return rows


def gradients(model: MultimodalModel) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tune", ["adapters", "full"])
def test_packed_row_equals_its_samples_one_at_a_time(attention: str, tune: str) -> None:
    model = build(llm={"attention": attention}, tune=tune).double()
    batch = mixed_batch()
    packed = model(batch)
    packed.loss_sum.backward()
    packed_gradients = gradients(model)
    model.zero_grad()
    losses = [model(row).loss_sum for row in alone(batch)]
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(packed.segment_losses, torch.stack(losses).detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(packed.loss_sum.detach(), packed.segment_losses.sum())
    single_gradients = gradients(model)
    tolerance = 1e-5 if attention == "eager" else 1e-7  # transformers' eager attention takes its softmax in fp32
    assert set(packed_gradients) == set(single_gradients)
    for name, gradient in packed_gradients.items():
        torch.testing.assert_close(
            gradient,
            single_gradients[name],
            rtol=tolerance,
            atol=tolerance / 100,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_segments_do_not_see_each_other() -> None:
    model = build()
    batch = mixed_batch()
    changed = dataclasses.replace(batch, input_ids=batch.input_ids.clone())
    start = int(batch.segment_lengths[0])
    changed.input_ids[start + 1 : start + 4] = (changed.input_ids[start + 1 : start + 4] + 1) % LLM["vocab_size"]
    lengths = batch.segment_lengths.tolist()
    before, after = (
        packed_hidden_states(
            model.llm,
            model.embed(row.input_ids, model.encode_images(row.pixels), row.image_slots),
            row.position_ids,
            row.segment_lengths,
        )
        for row in (batch, changed)
    )
    for number, (old, new) in enumerate(zip(before.split(lengths), after.split(lengths), strict=True)):
        assert torch.equal(old, new) == (number != 1)


def test_loss_is_the_cross_entropy_of_the_next_token() -> None:
    """Against transformers' own LLaMA run on one sample, its logits shifted by hand."""
    model = build().eval()
    row = make_batch([(9, [0])], num_images=1)
    embeds = model.embed(row.input_ids, model.encode_images(row.pixels), row.image_slots)
    logits = model.llm(inputs_embeds=embeds[None], use_cache=False).logits[0]
    num_predicted = row.num_label_tokens
    expected = F.cross_entropy(logits[-1 - num_predicted : -1], row.input_ids[-num_predicted:], reduction="sum")
    torch.testing.assert_close(model(row).loss_sum, expected, rtol=1e-5, atol=1e-5)


def test_embed_puts_each_vector_where_it_belongs() -> None:
    model = build()
    ids = torch.tensor(
        [IMAGE_MODALITY_TOKEN, 5, IMAGE_TOKEN, IMAGE_TOKEN, 6, IMAGE_TOKEN, IMAGE_TOKEN, TEXT_MODALITY_TOKEN, 7]
    )
    visual = torch.randn(3, VISUAL_TOKENS, LLM["hidden_size"])
    text, modality = model.llm.model.embed_tokens.weight, model.modality_embedding.weight
    expected = torch.stack(
        [modality[1], text[5], visual[2, 0], visual[2, 1], text[6], visual[0, 0], visual[0, 1], modality[0], text[7]]
    )
    assert torch.equal(model.embed(ids, visual, torch.tensor([2, 0])), expected)
    plain = torch.tensor([3, TEXT_MODALITY_TOKEN])
    assert torch.equal(
        model.embed(plain, visual[:0], torch.empty(0, dtype=torch.int64)), torch.stack([text[3], modality[0]])
    )


@pytest.mark.parametrize("tune", ["adapters", "full"])
@pytest.mark.parametrize(
    "name, num_images, dangling",
    [
        ("row without images", 0, False),
        ("row with a blank image", 1, True),
        ("filler", 0, False),
        ("filler with an image", 1, True),
    ],
)
def test_which_gradients_exist_depends_on_pixels_alone(tune: str, name: str, num_images: int, dangling: bool) -> None:
    """Ranks of one micro-step must reach the same parameters: zeros where nothing was learned, none where no ViT
    ran."""
    model = build(tune=tune)
    is_filler = name.startswith("filler")
    model(
        make_batch([(1 if is_filler else 6, [])], num_images=num_images, is_filler=is_filler, labels=not is_filler)
    ).loss_sum.backward()
    unused = model.vision.unused_parameters()
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter in unused:
            assert parameter.grad is None, parameter_name
        elif parameter_name.startswith(VISION_SIDE):
            assert (parameter.grad is not None) == dangling, parameter_name
            assert not dangling or not parameter.grad.any(), parameter_name
        else:
            assert parameter.grad is not None, parameter_name
            if is_filler:
                assert not parameter.grad.any(), parameter_name
    learned = model.llm.model.layers[0].input_layernorm.adapter.up_weight.grad
    assert bool(learned.any()) != is_filler


def test_an_image_that_no_slot_shows_changes_nothing() -> None:
    model = build()
    batch = make_batch([(7, [0]), (5, [])], num_images=1)
    extra = dataclasses.replace(batch, pixels=torch.cat([batch.pixels, torch.zeros_like(batch.pixels)]))
    model(batch).loss_sum.backward()
    expected = gradients(model)
    model.zero_grad()
    model(extra).loss_sum.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


def test_a_filler_weighs_nothing_even_with_labels() -> None:
    output = build()(make_batch([(6, [])], num_images=0, is_filler=True))
    assert output.loss_sum.item() == 0.0 and output.segment_losses.item() > 0


def test_no_pixels_no_vit_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    monkeypatch.setattr(model.vision, "forward", lambda pixels: pytest.fail("the ViT ran without images"))
    assert model(make_batch([(6, [])], num_images=0)).loss_sum.item() > 0
    assert model.encode_images(torch.empty(0, 3, 32, 32, dtype=torch.uint8)).shape == (
        0,
        VISUAL_TOKENS,
        LLM["hidden_size"],
    )


@pytest.mark.parametrize("tune", ["adapters", "full"])
def test_activation_checkpointing_recomputes_and_gives_the_same_gradients(tune: str) -> None:
    results = []
    for checkpointing in (False, True):
        model = build_model(tiny_config(tune=tune), activation_checkpointing=checkpointing)
        randomise_adapters(model)
        runs = []
        for block in (model.llm.model.layers[0].mlp, model.vision.live_blocks[0].mlp, model.vision.live_blocks[-1].mlp):
            block.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        model(mixed_batch()).loss_sum.backward()
        assert len(runs) == (6 if checkpointing else 3)
        results.append(gradients(model))
    assert set(results[0]) == set(results[1])
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


def test_broken_promises_of_the_loader_are_caught() -> None:
    model = build()
    batch = mixed_batch()
    with pytest.raises(AssertionError, match="labels, the batch says 1"):
        model(dataclasses.replace(batch, num_label_tokens=1))
    with pytest.raises(AssertionError, match="in a row of"):
        model(dataclasses.replace(batch, segment_lengths=batch.segment_lengths[:-1]))
    with pytest.raises(AssertionError, match="visual places for 3 images"):
        model(dataclasses.replace(batch, image_slots=batch.image_slots[:-1]))
