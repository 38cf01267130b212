"""Faults that were found in public code, planted one by one: each makes the audit fail, where it says."""

import copy
from dataclasses import replace

import pytest
import torch

import vltrain.ops.packed.masks as masks
from tests.audit.configs import config_of
from vltrain.audit.checks.export import check_export
from vltrain.audit.checks.generation import check_generation
from vltrain.audit.checks.packing import check_packing
from vltrain.audit.checks.training import check_shares, check_tuning
from vltrain.audit.small.config import shrink
from vltrain.audit.text_model import text_subject, text_tunings
from vltrain.audit.vision_model import VisionPieces, usual_tunings, vision_subject, vision_tuning
from vltrain.models.backbones import head
from vltrain.models.stock.model import ImageEncoder
from vltrain.ops.loss import PLAIN


def failures(subject):
    findings, _ = check_packing(subject)
    return {one.what: one for one in findings if not one.passed}


def small(kind):
    return shrink(config_of(kind)).config


def test_a_swallowed_window(monkeypatch):
    monkeypatch.setattr(masks.Rule, "near", lambda self, query, key: key <= query)
    found = failures(text_subject(small("mistral")))["states packed = alone"]
    assert found.difference > 0.1 and "sees no neighbour" in found.where and "from layer 0" in found.where


def test_positions_of_text_for_a_model_that_takes_three(monkeypatch):
    monkeypatch.setattr(VisionPieces, "_positions", lambda self, ids, images: torch.arange(len(ids)))
    found = failures(vision_subject(small("qwen2_5_vl")))["states packed = alone"]
    assert found.difference > 1e-3 and "image(s), sees no neighbour" in found.where


def test_an_image_block_that_leaks(monkeypatch):
    """Two images of a segment, which see each other as if they were one."""
    row = VisionPieces.row

    def leaking(self, pieces):
        return row(self, [replace(one, blocks=one.blocks.clamp(max=0)) for one in pieces])

    monkeypatch.setattr(VisionPieces, "row", leaking)
    found = failures(vision_subject(small("gemma3")))["states packed = alone"]
    assert found.difference > 1e-3 and "which shows 2 image(s)" in found.where


def test_a_tower_whose_boundaries_leak(monkeypatch):
    encode = ImageEncoder.forward

    def leaking(self, images):
        made = encode(self, images)
        features = made.output.pooler_output
        if len(features) > 1:
            rows = torch.cat([one.flatten(0, -2) for one in features])
            made.output.pooler_output = type(features)(one + 0.01 * rows.mean(0) for one in features)
        return made

    monkeypatch.setattr(ImageEncoder, "forward", leaking)
    found = failures(vision_subject(small("qwen2_5_vl")))["states packed = alone"]
    assert found.difference > 1e-4 and "image(s)" in found.where


def test_a_frozen_tower_that_trains(monkeypatch):
    config = small("llava")
    subject = vision_subject(config)
    tuning = vision_tuning("adapters", usual_tunings(config)["adapters"], subject)
    for name, parameter in tuning.model.named_parameters():
        if tuning.model.part_of(name) == "vision":
            parameter.requires_grad_(True)
    stays, _ = check_tuning(tuning, frozenset())
    assert not stays.passed and "vision_tower" in stays.where


def test_a_trained_part_that_is_not_reached():
    config = small("llava")
    subject = vision_subject(config)
    tuning = vision_tuning("projector", usual_tunings(config)["projector"], subject)
    bias = next(name for name in tuning.trained if name.endswith("bias"))
    tuning.model.get_parameter(bias).requires_grad_(False)
    _, reached = check_tuning(tuning, frozenset())
    assert not reached.passed and bias in reached.where


def test_a_head_without_its_softcap(monkeypatch):
    monkeypatch.setattr(head, "logit_transform", lambda model: PLAIN)
    found = failures(text_subject(small("gemma2")))
    assert "states packed = alone" not in found
    assert found["loss packed = alone"].difference > 1e-4 and "head" in found["loss packed = alone"].where


def test_prompts_padded_on_the_wrong_side(monkeypatch):
    subject = text_subject(small("mistral"))
    decode, (shortest, *_) = subject.decode, sorted(subject.prompts, key=lambda one: len(one.input_ids))

    def unmasked(prompts, steps):
        """As if the padding of the shortest prompt were tokens of it."""
        tokens, logits = decode(prompts, steps)
        longer = replace(shortest, input_ids=torch.cat([torch.zeros(3, dtype=torch.int64), shortest.input_ids]))
        changed = [longer if one is shortest else one for one in prompts]
        return tokens, decode(changed, steps)[1]

    subject.decode = unmasked
    (found,) = check_generation(subject)
    assert not found.passed and f"of {len(shortest.input_ids)} tokens, from step 1" in found.where


def test_a_loss_that_is_a_mean_of_its_own_pack():
    """What makes accumulation wrong where micro-batches have different numbers of labels."""
    subject = text_subject(small("mistral"))
    forward = subject.model.forward

    def averaged(batch):
        output = forward(batch)
        return output._replace(loss_sum=output.loss_sum / batch.num_label_tokens)

    subject.model.forward = averaged
    shared, _ = check_shares(subject)
    assert not shared.passed and shared.difference > 0.1 and "2 ranks" in shared.what


def test_a_merge_that_leaves_something_out():
    subject = text_subject(small("mistral"))
    _, lora = text_tunings(subject)
    (good,) = check_export(subject, lora)
    (found,) = check_export(subject, replace(lora, merged=lambda: copy.deepcopy(subject.reference)))
    assert good.passed and not found.passed and found.difference > 1e-3


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_without_a_fault_they_pass(kind):
    assert failures(text_subject(small(kind))) == {}
