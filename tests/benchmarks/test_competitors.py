"""Competitors train on our samples, weights and loss, each set up at its best. Nothing here is asserted on time."""

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.benchmarks import competitors, train
from tests.benchmarks.ours import benchmark_config, sizes
from tests.benchmarks.packed_peer import DenselyPackedModel, PackCollator, packs_of
from tests.benchmarks.peers import (
    GroupedTrainer,
    PaddedModel,
    PaddingCollator,
    padding_trainer,
    peer_model,
    trl_trainer,
)
from tests.benchmarks.samples import Samples, pack_samples, scienceqa_like
from tests.benchmarks.test_benchmarks import needs_trl, run_quick
from tests.support.reading import squares
from vltrain.config.schema import Config
from vltrain.data.images import decode_image
from vltrain.data.loader import collate
from vltrain.models.build import build_model

PIXELS = 10**6


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return benchmark_config(quick=True, output=str(tmp_path / "run"))


def some_samples(config: Config, count: int, **how: float) -> Samples:
    vocabulary, visual_tokens = sizes(config, quick=True)
    return scienceqa_like(count, vocabulary=vocabulary, visual_tokens=visual_tokens, **how)


def our_loss(config: Config, samples: Samples, folder: Path) -> float:
    """The mean over all label tokens, of our packs."""
    model = build_model(config.model)
    dataset = pack_samples(samples, 1280, folder / "packs", model.visual_tokens)
    ours, num_labels = 0.0, 0
    for number in range(len(dataset)):
        row = dataset.row(number)
        images = [decode_image(dataset.image(image), model.image_size, PIXELS, "") for image in row.image_ids.tolist()]
        batch = collate(row, images, squares(model))
        ours, num_labels = ours + float(model(batch).loss_sum.detach()), num_labels + batch.num_label_tokens
    return ours / num_labels


@pytest.mark.parametrize("length", [None, 900])
def test_padded_competitors_train_on_the_same_loss(config, tmp_path, length):
    """Same samples, same weights: transformers' loss over padded batches is ours over packs."""
    samples = some_samples(config, 5)
    assert samples.pictures and len(samples.pictures) < 5
    padded = PaddedModel(peer_model(config, torch.float32))
    theirs = padded(**PaddingCollator(samples, padded.model.image_size, PIXELS, length)(samples.segments)).loss
    assert float(theirs.detach()) == pytest.approx(our_loss(config, samples, tmp_path), rel=1e-5)


def test_the_packed_competitor_trains_on_the_same_loss(config, tmp_path):
    """With images, by dense masks; a mask without borders between samples has another."""
    samples = some_samples(config, 9)
    [pack] = packs_of(samples, 10_000)
    assert len(pack) == 9 and sum(len(one.images) for one in pack) > 1
    packed = DenselyPackedModel(peer_model(config, torch.float32))
    row = PackCollator(samples, packed.model.image_size, PIXELS)([pack])
    ours = our_loss(config, samples, tmp_path)
    assert float(packed(**row).loss.detach()) == pytest.approx(ours, rel=1e-5)
    row["row_mask"] = torch.ones_like(row["row_mask"]).tril()
    assert float(packed(**row).loss.detach()) != pytest.approx(ours, rel=1e-5)


@needs_trl
@pytest.mark.parametrize("how", [{"pack_length": 10_000}, {"batch_size": 5}])
def test_trl_trains_on_the_same_loss(config, tmp_path, how):
    """On text, packed and `padding_free`: samples do not see each other. Its model has no placeholders."""
    samples = some_samples(config, 5, image_share=0.0)
    plain = [replace(one, input_ids=one.input_ids.clip(min=0)) for one in samples.segments]
    samples = replace(samples, segments=plain)
    held = trl_trainer(config, samples, torch.float32, folder=tmp_path, **how)
    assert int(held.step()) == sum(len(one.input_ids) for one in plain)
    held.stop()
    assert float(held.losses[0]) == pytest.approx(our_loss(config, samples, tmp_path), rel=1e-5)


def test_batches_that_are_accumulated_are_one_step(config, tmp_path):
    """As many samples a step in batches of 1 as in batches of 4, on the same loss before anything is learned."""
    samples = some_samples(config, 4)
    one, four = (
        padding_trainer(config, samples, torch.float32, folder=tmp_path, grouped=True, length=None, **how)
        for how in ({"batch_size": 1, "accumulate": 4}, {"batch_size": 4})
    )
    assert int(one.step()) == int(four.step()) == sum(len(each.input_ids) for each in samples.segments)
    one.stop(), four.stop()
    assert len(one.losses) == 4 and len(four.losses) == 1
    assert float(sum(one.losses)) == pytest.approx(float(four.losses[0]), rel=1e-5)


def test_the_grouped_competitor_pads_less_and_shows_every_sample_once(tmp_path):
    """Its batches are those of transformers' own sampler; what differs is which comes first."""
    segments = scienceqa_like(400, vocabulary=100, visual_tokens=4).segments
    trainer = GroupedTrainer.__new__(GroupedTrainer)
    trainer.args, trainer.train_dataset = SimpleNamespace(train_batch_size=8), segments
    order = trainer._get_train_sampler()
    lengths = np.array([len(segments[number].input_ids) for number in order])
    assert sorted(order) == list(range(400))

    def positions(lengths: np.ndarray) -> float:
        return float((8 * lengths.reshape(-1, 8).max(axis=1)).sum() / lengths.sum())

    assert positions(lengths) < 1.2 < 1.6 < positions(np.random.default_rng(0).permutation(lengths))
    assert lengths[:8].max() < lengths.max()  # not the longest first


def test_the_fastest_way_goes_on_and_the_others_stop(monkeypatch, capsys):
    monkeypatch.setattr(competitors, "timed", lambda step: lambda: (step(), 1.0))
    stopped = []
    held = {
        name: SimpleNamespace(step=lambda speed=speed: speed, stop=lambda name=name: stopped.append(name))
        for name, speed in {"a": 3, "b": 7, "c": 5}.items()
    }
    best = held["b"]
    assert competitors.fastest(held) == ("b", best) and stopped == ["a", "c"]
    assert "b 7.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data", "scienceqa", "--only", "TRL packing"], "--only: none of these trains on --data scienceqa"),
        (["--data", "scienceqa", "--batches", "0"], "--batches: found 0"),
        (["--data", "scienceqa", "--runs", "0"], "--runs: found 0"),
        (["--data", "scienceqa", "--cpu"], "--cpu: threads that wait"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, words, told):
    monkeypatch.setattr(sys, "argv", ["train", *words])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(SystemExit) as ended:
        train.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith(f"error: {told}") and error.count("\n") == 1


@needs_trl
@pytest.mark.slow
def test_train_with_every_competitor(tmp_path):
    found = run_quick("train", tmp_path, "--data", "scienceqa", "text", "--batches", "2")
    kinds = {(row["data"], row["trainer"].removesuffix(", batches of 2")) for row in found["speed"]}
    expected = {"scienceqa": competitors.kinds_of("scienceqa"), "text": competitors.kinds_of("text")}
    assert kinds == {(data, name) for data, names in expected.items() for name in ("ours", *names)}
    assert all(row["useful tokens/s"] > 0 and row["ours is faster by"] > 0 for row in found["speed"])
    for data in expected:  # ours, then the strongest first
        ratios = [row["ours is faster by"] for row in found["speed"] if row["data"] == data]
        assert ratios[0] == 1.0 and ratios[1:] == sorted(ratios[1:])
    assert {row["data"] for row in found["utilisation"]} == {"scienceqa", "text"} and all(
        row["mfu"] > 0 for row in found["utilisation"]
    )


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_the_patched_competitor_is_liger_s(config):
    from liger_kernel.transformers.model.llama import lce_forward
    from transformers.models.llama import modeling_llama

    from tests.benchmarks.peers import patch_by_liger

    llm = peer_model(config, torch.float32).llm
    patch_by_liger(llm)
    assert llm.forward.__func__ is lce_forward and "liger" not in modeling_llama.LlamaRMSNorm.forward.__module__
