"""A sample out of a pack is what it was before it was packed: losses and gradients of every architecture."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.blip import blip_config
from tests.support.reading import squares
from tests.support.stock_world import stock_recipe
from tests.support.tiny import make_segments, tiny_config, write_packs
from tests.train.test_kept_features import blip_packs
from tests.train.test_stock_resume import packed
from vltrain.config.command_line import load_settings
from vltrain.data.loader import collate
from vltrain.data.reading import image_reader
from vltrain.data.shards import PackedDataset
from vltrain.models.build import build_model
from vltrain.programs.blame.measuring import _Meter
from vltrain.programs.blame.ranking import Place

KINDS = ("mmt", "llama", "t5", "smolvlm", pytest.param("qwen2_5_vl", marks=pytest.mark.slow))


def world(kind: str, folder: Path):
    """(model, reader, packs) of an architecture, a tiny one in fp32."""
    torch.manual_seed(0)
    if kind == "mmt":
        config, packs = tiny_config(), write_packs(folder / "packs", make_segments(8))
    elif kind in ("llama", "t5"):
        config, packs = blip_config(kind, qformer__mode="lora", llm__mode="lora"), blip_packs(folder, kind)
    else:
        recipe = stock_recipe(kind, folder, {"projector": {"train": True}})
        config, packs = load_settings(["--recipe", str(recipe)], program="test").config, Path(packed(recipe))
    model = build_model(config.model, dtype=torch.float32)
    return model.train(), image_reader(config, model), PackedDataset(packs)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_pack(kind, tmp_path):
    model, reader, packs = world(kind, tmp_path)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn_like(weight)
    trainable = {name: one for name, one in model.named_parameters() if one.requires_grad}
    engine = SimpleNamespace(
        model=model,
        trainable=trainable,
        device=torch.device("cpu"),
        autocast=lambda: torch.autocast("cpu", enabled=False),
    )
    trainer = SimpleNamespace(engine=engine, loader=SimpleNamespace(kept=None))
    meter = _Meter(SimpleNamespace(trainer=trainer, dataset=packs, reader=reader))
    for number in range(2):
        row = packs.row(number)
        pictures = [reader.decode(packs.image(one), "test") for one in row.image_ids.tolist()]
        batch = collate(row, pictures, reader)
        together = model.eval()(batch)
        whole = torch.autograd.grad(together.loss_sum, list(trainable.values()), allow_unused=True)
        added = [torch.zeros_like(weight) for weight in trainable.values()]
        for segment, (loss, count) in enumerate(zip(together.segment_losses.tolist(), batch.segment_labels().tolist())):
            place = Place(number, segment)
            tokens, norm = meter.with_gradient(place, 5)
            assert len(tokens) == count and sum(tokens) == pytest.approx(loss, rel=2e-5)
            assert meter.losses(place) == tokens
            alone = meter._batches.of(place)
            assert alone.sample_ids == row.sample_ids[segment : segment + 1]
            found = torch.autograd.grad(model(alone).loss_sum, list(trainable.values()), allow_unused=True)
            parts = [one for one in found if one is not None]
            assert norm == pytest.approx(float(torch.nn.utils.get_total_norm(parts)) / 5, rel=1e-4)
            own_mean = meter.with_gradient(place, None)[1]
            assert own_mean == pytest.approx(norm * 5 / count, rel=1e-4)
            for total, one in zip(added, found, strict=True):
                total += 0 if one is None else one
        size = float(torch.nn.utils.get_total_norm([one for one in whole if one is not None]))
        for total, one in zip(added, whole, strict=True):
            expected = torch.zeros_like(total) if one is None else one
            assert float((total - expected).norm()) < 2e-5 * size
        assert size > 0


def test_each_segment_takes_its_own_images(tmp_path):
    packs = PackedDataset(write_packs(tmp_path / "packs", make_segments(4)))
    model = build_model(tiny_config().model, dtype=torch.float32)
    trainer = SimpleNamespace(engine=SimpleNamespace(model=model), loader=SimpleNamespace(kept=None))
    batches = _Meter(SimpleNamespace(trainer=trainer, dataset=packs, reader=squares(model)))._batches
    row = packs.row(0)  # of three samples the first and the last show one image
    shown = [batches.of(Place(0, segment)).pixels for segment in range(3)]
    assert [len(one) for one in shown] == [1, 1, 1] and torch.equal(shown[0], shown[2])
    assert not torch.equal(shown[0], shown[1]) and len(row.image_ids) == 2
    text = batches.of(Place(2, 0))
    assert len(text.pixels) == 0 and len(text.image_slots) == 0
