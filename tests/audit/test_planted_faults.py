"""Faults that were found in public code, or that a careless edit could bring, planted one by one: each makes the audit
fail, where it says."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import vltrain.models.instructblip.model as blip_model
import vltrain.ops.packed.masks as masks
from tests.audit.recipes import blip, both, family, mmt, subject
from vltrain.audit.checks.export import check_export
from vltrain.audit.checks.generation import check_generation
from vltrain.audit.checks.packing import check_packing
from vltrain.audit.checks.training import check_shares, check_tuning
from vltrain.audit.subjects.stock import StockReference
from vltrain.data import loader
from vltrain.evaluate.answering.decoding import Decoder
from vltrain.models.adapters.base import Adapter
from vltrain.models.adapters.table import NormThenAdapter
from vltrain.models.backbones import head
from vltrain.models.mmt.model import MultimodalModel
from vltrain.models.mmt.visual_tokens import VisualTokens
from vltrain.models.stock.model import ImageEncoder
from vltrain.ops.loss import PLAIN


def failures(made):
    return {one.what: one for one in check_packing(made).findings if one.passed is False}


STATES, EMBEDS, LOSS, GRADIENT = (f"{one} packed = alone" for one in ("states", "embeddings", "loss", "gradient"))


def test_a_swallowed_window(monkeypatch):
    monkeypatch.setattr(masks.Rule, "near", lambda self, query, key: key <= query)
    found = failures(family("mistral"))[STATES]
    assert found.difference > 0.1 and "sees no neighbour" in found.where and "from layer 0" in found.where


def test_a_window_one_too_long(monkeypatch):
    near = masks.Rule.near
    monkeypatch.setattr(masks.Rule, "near", lambda self, query, key: near(self, query - 1, key) & (key <= query))
    assert "sees no neighbour" in failures(family("mistral"))[STATES].where


def test_positions_of_text_for_a_model_that_takes_three(monkeypatch):
    def counted(self, segment):
        return replace(segment, position_ids=np.arange(len(segment.input_ids), dtype=np.int32)[None])

    monkeypatch.setattr(StockReference, "placed", counted)
    found = failures(family("qwen2_5_vl"))
    assert "image(s), sees no neighbour" in found[STATES].where


def test_axes_of_positions_in_another_order(monkeypatch):
    placed = StockReference.placed

    def swapped(self, segment):
        found = placed(self, segment)
        return replace(found, position_ids=found.position_ids[[0, 2, 1]])

    monkeypatch.setattr(StockReference, "placed", swapped)
    found = failures(family("qwen2_5_vl"))["positions packed = alone"]
    assert "in row 2 of positions" in found.where


def test_positions_one_off(monkeypatch):
    """Of which rotary attention alone would show nothing."""
    monkeypatch.setattr(loader, "_positions", lambda row, counted: loader.tensor_of(counted + 1))
    found = failures(subject(mmt()))
    assert list(found) == ["positions packed = alone"]
    assert found["positions packed = alone"].where == "segment 1 of 6: token 1 stands at 1 instead of 0"


def test_an_image_block_that_leaks(monkeypatch):
    """Two images of a segment, which see each other as if they were one."""
    collate = loader.assemble

    def leaking(row, pixels):
        return collate(replace(row, blocks=row.blocks.clip(max=0)), pixels)

    monkeypatch.setattr(loader, "assemble", leaking)
    found = failures(family("gemma3"))[STATES]
    assert found.difference > 1e-3 and "which shows 2 image(s)" in found.where


def test_a_stock_tower_whose_boundaries_leak(monkeypatch):
    encode = ImageEncoder.forward

    def leaking(self, images):
        made = encode(self, images)
        if len(made.tokens) < 2:
            return made
        pooled, *deep = made.layers
        return replace(made, layers=(pooled + 0.01 * pooled.mean(0), *deep))

    monkeypatch.setattr(ImageEncoder, "forward", leaking)
    assert "its visual tokens depend on what else is in the row" in failures(family("qwen2_5_vl"))[EMBEDS].where


def test_visual_tokens_that_leak(monkeypatch):
    """Of `mmt`: a mean over all images of a row."""
    start = VisualTokens._start

    def leaking(self, pixels):
        states, beside = start(self, pixels)
        return states + 0.01 * states.mean(0, keepdim=True), beside

    monkeypatch.setattr(VisualTokens, "_start", leaking)
    found = failures(subject(mmt()))[EMBEDS]
    assert found.difference > 1e-4 and "image 1: its visual tokens" in found.where


def test_a_question_that_leaks_into_another_s_image(monkeypatch):
    """The Q-Former's padding is read."""
    qformer = blip_model.InstructBlip.ask_images

    def unmasked(self, states, slots, instruction_ids):
        return qformer(self, states, slots, instruction_ids.clamp(min=0))

    monkeypatch.setattr(blip_model.InstructBlip, "ask_images", unmasked)
    found = failures(subject(blip(**both("lora"))))[EMBEDS]
    assert "depend on what else is in the row" in found.where


@pytest.mark.parametrize("fault", ["order", "slot"])
def test_images_in_each_other_s_place(fault, monkeypatch):
    embed = MultimodalModel.embed

    def wrong(self, input_ids, visual, slots):
        turned = slots.flip(0) if fault == "order" else (slots + 1) % max(1, len(visual))
        return embed(self, input_ids, visual, turned)

    monkeypatch.setattr(MultimodalModel, "embed", wrong)
    assert "in the place of picture" in failures(subject(mmt()))[EMBEDS].where


def test_an_adapter_applied_twice(monkeypatch):
    twice = lambda self, x: self.adapter(self.adapter(self.norm(x)))
    monkeypatch.setattr(NormThenAdapter, "forward", twice)
    found = failures(subject(mmt(adapter={"kind": "loha_silu", "vision": "none"})))
    assert "from layer 0" in found[STATES].where and EMBEDS not in found


def test_a_frozen_tower_that_trains():
    made = subject(mmt())
    for name, parameter in made.model.named_parameters():
        if made.model.part_of(name) == "vision":
            parameter.requires_grad_(True)
    packing = check_packing(made)
    assert "a gradient that transformers does not have: vision." in packing.findings[-1].where
    stays, _ = check_tuning(made, packing.free)
    assert not stays.passed and "vision." in stays.where


@pytest.mark.parametrize("part", ["adapter", "neck"])
def test_a_trained_part_that_is_not_reached(part):
    made = subject(mmt())
    name = next(name for name in sorted(made.trained) if made.model.part_of(name) == part)
    made.model.get_parameter(name).requires_grad_(False)
    _, reached = check_tuning(made, frozenset())
    assert not reached.passed and name in reached.where


def test_an_adapter_that_text_does_not_reach(monkeypatch):
    """Its ranks would wait for each other, or step on the gradient of the row before."""
    monkeypatch.setattr(MultimodalModel, "embed", _without_unshown(MultimodalModel.embed))
    _, reached = check_tuning(subject(mmt()), frozenset())
    assert not reached.passed and reached.where.startswith("a row of text, with an image for other ranks' sake: ")


def _without_unshown(embed):
    return lambda self, input_ids, visual, slots: embed(self, input_ids, visual if len(slots) else visual[:0], slots)


def test_a_head_without_its_softcap(monkeypatch):
    monkeypatch.setattr(head, "logit_transform", lambda model: PLAIN)
    found = failures(family("gemma2"))
    assert STATES not in found
    assert found[LOSS].difference > 1e-4 and "head" in found[LOSS].where


def test_a_head_without_its_bias(monkeypatch):
    made = family("phi", settings={})
    made.model.llm.lm_head.bias = None
    found = failures(made)
    assert STATES not in found and "head" in found[LOSS].where


def scaled(made, factor):
    forward = made.model.forward

    def changed(batch):
        output = forward(batch)
        return output._replace(loss_sum=output.loss_sum * factor(batch))

    made.model.forward = changed
    return made


def test_a_gradient_scaled_by_the_number_of_ranks():
    found = failures(scaled(family("mistral"), lambda batch: 2.0))
    assert "all of it is 2 times as large as transformers'" in found[GRADIENT].where
    assert "not their sum over labels" in found[LOSS].where


def test_a_loss_averaged_by_segment():
    made = family("mistral")
    forward = made.model.forward

    def averaged(batch):
        output = forward(batch)
        weights = batch.label_lengths.clamp(min=1)
        return output._replace(loss_sum=output.loss_sum * (output.segment_losses / weights).sum() / output.loss_sum)

    made.model.forward = averaged
    assert "not their sum over labels" in failures(made)[LOSS].where


def test_a_loss_that_is_a_mean_of_its_own_pack():
    """What makes accumulation wrong where micro-batches have different numbers of labels."""
    made = scaled(family("mistral"), lambda batch: 1 / max(1, batch.num_label_tokens))
    shared, _ = check_shares(made, check_packing(made).gradients)
    assert not shared.passed and shared.difference > 0.1 and "2 ranks" in shared.what


def test_padding_that_is_seen_while_answering(monkeypatch):
    decode = Decoder._decode

    def unmasked(self, tokens):
        self.mask = torch.ones_like(self.mask)
        return decode(self, tokens)

    monkeypatch.setattr(Decoder, "_decode", unmasked)
    (found,) = check_generation(subject(mmt()))
    assert not found.passed and "from step 2 of 6 on" in found.where


def test_dropout_while_answering(monkeypatch):
    monkeypatch.setattr(Adapter, "active_dropout", property(lambda self: self.dropout))
    (found,) = check_generation(subject(mmt()))
    assert not found.passed and "from step 1" in found.where


@pytest.mark.parametrize("made", ["mistral", "mmt", "blip"])
def test_a_merge_that_leaves_something_out(made, monkeypatch):
    made = family("mistral", "LoRA") if made == "mistral" else subject(mmt() if made == "mmt" else blip(**both("lora")))
    original = made.folded
    updated = [name for name in sorted(made.trained) if "lora_B" in name or "up_weight" in name]

    def folded():
        made.model.get_parameter(updated[-1]).data.zero_()
        return original()

    made.folded = folded
    (found,) = check_export(made)
    assert not found.passed and found.difference > 1e-5


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_without_a_fault_they_pass(kind):
    assert failures(family(kind)) == {}
