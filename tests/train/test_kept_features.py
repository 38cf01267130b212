"""`train.keep_image_features`: the same losses, gradients and weights as with images encoded in every step, for each
architecture, under ZeRO 3 too; a store that is begun is gone on with, one that is damaged or of another tower is not
used, and what cannot be kept is refused."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.support.blip import QUERIES, blip_config, make_samples, make_tokenizers
from tests.support.processes import run_ranks
from tests.support.stock_world import stock_recipe
from tests.support.tiny import make_segments, tiny_config, write_packs
from tests.train.plain_loop import relative_difference
from tests.train.test_stock_resume import packed
from tests.train.zero.test_equivalence import stage
from vltrain.batch import ImageFeatures
from vltrain.config.command_line import load_settings
from vltrain.config.schema import Config
from vltrain.data.kept import store
from vltrain.data.kept.store import MANIFEST, FeatureStore, entries_of
from vltrain.data.loader import StepLoader
from vltrain.data.plan import PackCost, Plan
from vltrain.data.reading import image_reader
from vltrain.data.shards import PackedDataset
from vltrain.data.text.conversation import encode_sample
from vltrain.data.text.tokenizer import InstructionSource, load_tokenizer
from vltrain.errors import InputError
from vltrain.models.build import build_model
from vltrain.models.flops import matrix_flops
from vltrain.train.kept_features import FeatureMaker
from vltrain.train.run.fits import kept_image_part, run_flops

KEPT = {"train__keep_image_features": True}
MMT = {"model__adapter__vision": "none"}
STEPS = {"train__packs_per_step": 3, "train__max_steps": 6, "train__epochs": 10.0, "train__save_every_steps": 1000}
STOCK = {"llm": {"peft": {"kind": "lora"}}}
NO_ADAPTERS = {"vision": "none", "llm": "none"}


def blip_packs(folder: Path, kind: str = "llama") -> Path:
    places = make_tokenizers(folder / "tokenizers")
    tokenizer = load_tokenizer(places[kind], InstructionSource(source=places["bert"], max_tokens=32))
    template = blip_config(kind).data.template
    segments = [encode_sample(one, tokenizer, template, QUERIES) for one in make_samples(24)]
    return write_packs(folder / "packs", [segments[first : first + 2] for first in range(0, 24, 2)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks, each once with images and once, or more, with features."""
    folder = tmp_path_factory.mktemp("kept")
    mmt, blip = str(write_packs(folder / "mmt", make_segments(100))), str(blip_packs(folder / "blip"))
    (folder / "smolvlm").mkdir()
    recipe = stock_recipe("smolvlm", folder / "smolvlm", STOCK, adapter=NO_ADAPTERS)
    of_mmt, of_blip = {"packs": mmt, "changes": {**STEPS, **MMT}}, {"packs": blip, "blip": "llama", "changes": STEPS}
    of_stock = {"packs": packed(recipe), "recipe": str(recipe), "changes": {"train__packs_per_step": 3}}
    told: list[dict[str, Any]] = [
        {**of_mmt, "name": "mmt", "ds": stage(2)},
        {**of_mmt, "name": "mmt-kept", "ds": stage(3), "changes": {**of_mmt["changes"], **KEPT}},
        {**of_mmt, "name": "mmt-shared", "ds": stage(0), "changes": {**of_mmt["changes"], **KEPT}},
        {**of_mmt, "name": "mmt-other", "ds": stage(0), "changes": {**of_mmt["changes"], **KEPT, "model__seed": 1}},
        {**of_blip, "name": "blip", "ds": stage(3)},
        {**of_blip, "name": "blip-kept", "ds": stage(3), "changes": {**STEPS, **KEPT}},
        {**of_stock, "name": "stock", "ds": stage(2)},
        {**of_stock, "name": "stock-kept", "ds": stage(3), "changes": {**of_stock["changes"], **KEPT}},
    ]
    for one in told:
        one["output"] = str(folder / "runs" / one["name"])
    (folder / "scenarios.json").write_text(json.dumps(told))
    run_ranks("tests.train.worker", [str(folder / "scenarios.json")], 2, folder / "log")
    return folder


def result(runs: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(runs / "runs" / name / "result.safetensors")


@pytest.mark.slow  # eight runs; forward by forward it is shown below
@pytest.mark.parametrize(
    ("plain", "kept"), [("mmt", "mmt-kept"), ("mmt", "mmt-shared"), ("blip", "blip-kept"), ("stock", "stock-kept")]
)
def test_a_run_with_features_is_the_run_with_images(runs: Path, plain: str, kept: str) -> None:
    expected, found = result(runs, plain), result(runs, kept)
    assert expected.keys() == found.keys() and expected["losses"][-1] != expected["losses"][0]
    assert relative_difference(found["losses"], expected["losses"]) < 1e-6
    gradients = {name: value for name, value in expected.items() if name.startswith("gradient/")}
    least = max(value.abs().max().item() for value in gradients.values()) / 1000
    worst = {name: relative_difference(found[name], value, least) for name, value in gradients.items()}
    assert max(worst.values()) < 3e-5, worst


@pytest.mark.slow  # the same runs
def test_runs_of_one_tower_share_their_features_and_another_tower_has_its_own(runs: Path) -> None:
    stores = [file.parent for file in (runs / "mmt").glob(f"features-*/{MANIFEST}")]
    assert len(stores) == 2
    facts = [json.loads((store / MANIFEST).read_text())["facts"] for store in stores]
    assert [name for name in facts[0] if facts[0][name] != facts[1][name]] == ["weights"]
    shared, other = (result(runs, name)["losses"] for name in ("mmt-shared", "mmt-other"))
    assert not torch.equal(shared, other)


@pytest.mark.slow  # the same runs
def test_a_run_says_that_it_keeps_features_and_others_are_called_as_before(runs: Path) -> None:
    """Receipts are named after what the run is."""
    heads = {
        name: json.loads((runs / "runs" / name / "receipt.jsonl").read_text().splitlines()[0])["run"]
        for name in ("mmt", "mmt-kept", "mmt-shared")
    }
    assert heads["mmt-kept"] == heads["mmt-shared"] != heads["mmt"]


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def maker(config: Config, packs: Path | str, **of_engine: Any) -> FeatureMaker:
    model, dataset = build_model(config.model), PackedDataset(packs)
    engine: Any = SimpleNamespace(
        model=model, stage=0, device=torch.device("cpu"), precision="fp32", autocast=contextlib.nullcontext, **of_engine
    )
    part = model.image_part()
    assert part is not None
    reader = image_reader(config, model)
    return FeatureMaker(config=config, engine=engine, dataset=dataset, reader=reader, part=part)


def compare_rows(made: FeatureMaker) -> None:
    """Losses of every pack with its images, and with their features."""
    kept, model, dataset = made.kept(), made.engine.model, made.dataset
    plan = Plan(dataset.index, seed=0, epochs=1.0, packs_per_step=1, world_size=1, cost=PackCost(), images_always=True)
    loaders = [StepLoader(dataset, plan, 0, made.reader, 0, kept=one) for one in (None, kept)]
    for with_images, with_features in zip(*loaders, strict=True):
        [image], [feature] = with_images.batches, with_features.batches
        assert isinstance(feature.pixels, ImageFeatures) and feature.pixels.lengths.sum() > 0
        expected, found = (model(batch).segment_losses for batch in (image, feature))
        assert relative_difference(found, expected) < 1e-6


@pytest.mark.parametrize("kind", ["mmt", "llama", "t5"])
def test_losses_are_those_of_the_images(kind: str, alone: None, tmp_path: Path) -> None:
    if kind == "mmt":
        compare_rows(maker(tiny_config(**MMT, **KEPT), write_packs(tmp_path / "packs", make_segments(8))))
    else:
        compare_rows(maker(blip_config(kind, **KEPT), blip_packs(tmp_path, kind)))


@pytest.mark.parametrize(
    "kind", ["qwen3_vl", *(pytest.param(one, marks=pytest.mark.slow) for one in ("internvl", "llava_onevision"))]
)
def test_a_stock_models_losses_are_those_of_its_images(kind: str, alone: None, tmp_path: Path) -> None:
    """Further layers beside the pooled output, tiles in one tensor, images that are cut up where they stand alone."""
    recipe = stock_recipe(kind, tmp_path, STOCK, adapter=NO_ADAPTERS, data={"workers": 2})
    made = maker(load_settings(["--recipe", str(recipe)], program="test").config, packed(recipe))
    compare_rows(made)
    if kind == "llava_onevision":
        entries = entries_of(made.dataset)
        assert len(set(entries.image_ids.tolist())) < len(entries) and set(entries.counts.tolist()) == {1, 2}


def test_what_a_killed_run_left_is_gone_on_with(alone: None, tmp_path: Path) -> None:
    config, packs = tiny_config(**MMT, **KEPT), write_packs(tmp_path / "packs", make_segments(200))
    kept = maker(config, packs).kept()
    parts = sorted(kept.folder.glob("part-*"))
    bytes_of = {path.name: path.read_bytes() for path in parts}
    assert len(parts) == 3
    (kept.folder / MANIFEST).unlink()
    parts[0].write_bytes(bytes_of[parts[0].name][:-1])  # as a file system may leave it
    parts[2].unlink()
    (kept.folder / f".{parts[2].name}.999999.tmp").write_bytes(bytes_of[parts[2].name][:100])
    left = parts[1].stat().st_mtime_ns
    again = maker(config, packs).kept()
    assert {path.name: path.read_bytes() for path in again.folder.glob("part-*")} == bytes_of
    assert parts[1].stat().st_mtime_ns == left and not list(again.folder.glob(".*"))


def make_features(packs: str, part_images: int) -> None:
    """In a process that may be killed."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with patch.object(store, "PART_IMAGES", part_images):
        maker(tiny_config(**MMT, **KEPT), packs).kept()
    dist.destroy_process_group()


@pytest.mark.slow  # some seconds for each process
def test_kill_9_while_features_are_made_loses_no_whole_part_and_changes_no_byte(tmp_path: Path) -> None:
    segments, spawn = make_segments(600), multiprocessing.get_context("spawn")
    packs = {name: str(write_packs(tmp_path / name, segments)) for name in ("killed", "alone")}
    killed, whole, draw = 0, 0, random.Random(0)
    for _ in range(8):
        process = spawn.Process(target=make_features, args=(packs["killed"], 4))
        process.start()
        while process.is_alive() and len(list(Path(packs["killed"]).glob("features-*/part-*"))) < whole + 2:
            time.sleep(0.001)
        time.sleep(draw.random() / 50)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        whole = len(list(Path(packs["killed"]).glob("features-*/part-*")))
    assert killed >= 6, "it was done before it was killed"
    for place in packs.values():
        process = spawn.Process(target=make_features, args=(place, 4))
        process.start()
        process.join()
        assert process.exitcode == 0
    found, expected = (
        {path.name: path.read_bytes() for path in Path(place).glob("features-*/*")} for place in packs.values()
    )
    assert len(expected) > 100 and found == expected
    assert not list(Path(packs["killed"]).glob("features-*/.*"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "of other weights"])
def test_a_damaged_store_is_found(damage: str, alone: None, tmp_path: Path) -> None:
    config, packs = tiny_config(**MMT, **KEPT), write_packs(tmp_path / "packs", make_segments(4))
    made = maker(config, packs)
    store = made.kept().folder
    part = store / "part-000000.safetensors"
    data = bytearray(part.read_bytes())
    if damage == "cut":
        part.write_bytes(data[:-4])
    elif damage == "gone":
        part.unlink()
    elif damage == "flipped":
        data[-3] ^= 0x40
        part.write_bytes(data)
    else:  # what no fact says: the forward itself
        made.engine.model.vision.clip.encoder.layers[0].register_forward_hook(lambda *given: given[-1] * 1.5)
    with pytest.raises(InputError, match="bytes|missing|damaged|not those of this image part") as error:
        made.kept()
    assert f"remove {store}" in str(error.value)


@pytest.mark.parametrize(("spoil", "told"), [("dropout", "as dropout does"), ("trained", "has a gradient")])
def test_features_that_are_not_the_same_each_time_are_refused(
    spoil: str, told: str, alone: None, tmp_path: Path
) -> None:
    config, packs = tiny_config(**MMT, **KEPT), write_packs(tmp_path / "packs", make_segments(4))
    made = maker(config, packs)
    block = made.engine.model.vision.clip.encoder.layers[0]
    if spoil == "dropout":
        block.register_forward_hook(lambda *given: torch.nn.functional.dropout(given[-1], 0.5))
    else:
        next(block.parameters()).requires_grad_(True)
    with pytest.raises(InputError, match=told):
        made.kept()
    assert not list(packs.glob("features-*/*"))


def test_a_disk_without_room_is_found_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"take 1048576.00 GiB .* are free; make room"):
        FeatureStore(tmp_path, {}).require_room(1 << 50)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, r"is trained, .*: adapter \(\d+ parameters, the first vision\."),
        ({**MMT, "model__vision__train": True}, r"is trained, .*: vision "),
    ],
)
def test_an_image_part_that_is_trained_is_refused(changes: dict[str, Any], told: str) -> None:
    config = tiny_config(**changes, **KEPT)
    with pytest.raises(InputError, match=told):
        kept_image_part(config, build_model(config.model, device="meta"))


def test_a_trained_projector_of_a_stock_model_is_refused(tmp_path: Path) -> None:
    recipe = stock_recipe("llava", tmp_path, {"tune": "projector"}, adapter={}, train={"keep_image_features": True})
    config = load_settings(["--recipe", str(recipe)], program="test").config
    with pytest.raises(InputError, match="is trained, .*: projector"):
        kept_image_part(config, build_model(config.model, device="meta"))


def test_packs_without_images_are_refused(tmp_path: Path) -> None:
    texts = [pack for pack in make_segments(8) if not any(one.images for one in pack)]
    config, dataset = tiny_config(**MMT, **KEPT), PackedDataset(write_packs(tmp_path / "packs", texts))
    with pytest.raises(InputError, match="has no effect: .* shows no image"):
        kept_image_part(config, build_model(config.model, device="meta"), dataset)


def test_an_image_costs_what_is_left_of_it() -> None:
    """Of mmt the neck, which is trained; of InstructBLIP what is not its ViT; packs are shared out by that."""
    config = tiny_config(**MMT, **KEPT)
    model = build_model(config.model, device="meta")
    linears = [one for one in model.neck.modules() if isinstance(one, torch.nn.Linear)]
    first, *others = (matrix_flops(one.weight, needs_grad=number > 0) for number, one in enumerate(linears))
    assert run_flops(config, model).per_image == pytest.approx(model.visual_tokens * (first + sum(others)))
    blip = blip_config("llama", **KEPT)
    outline = build_model(blip.model, device="meta")
    assert 0 < run_flops(blip, outline).per_image < outline.flops().per_image
