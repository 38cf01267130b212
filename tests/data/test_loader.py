"""Packs to batches against a plain loop over the samples they were made of: any ranks, any workers, from any step on;
and what damage does."""

import io
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from tests.support import tiny
from tests.support.processes import ROOT
from tests.support.tiny import IMAGE_SIZE, VISUAL_TOKENS, make_segments, write_packs
from vltrain.data import loader as loader_module
from vltrain.data import pictures
from vltrain.data.loader import StepLoader, filler
from vltrain.data.pictures import SquareReader
from vltrain.data.plan import FILLER, PackCost, Plan
from vltrain.data.shards import PackedDataset
from vltrain.errors import InputError
from vltrain.schema import IGNORE_INDEX, IMAGE_TOKEN

PACKS = make_segments(14)
READER = SquareReader(size=IMAGE_SIZE)
NUM_STEPS = 6  # 28 packs, five a step; the last step has three


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return PackedDataset(write_packs(tmp_path_factory.mktemp("loader") / "packs", PACKS))


def plan_of(dataset: PackedDataset, world_size: int = 1, **changes) -> Plan:
    settings = {"seed": 1, "epochs": 2.0, "packs_per_step": 5, "cost": PackCost(), **changes}
    return Plan(dataset.index, world_size=world_size, **settings)


def load(dataset: PackedDataset, plan: Plan, rank: int = 0, workers: int = 0, start_step: int = 0) -> StepLoader:
    return StepLoader(dataset, plan, rank, READER, workers, start_step)


def reference_pixels() -> dict[str, np.ndarray]:
    """Each image name's picture, drawn again as `write_packs` draws it, and resized by Pillow alone. uint8 [3, H, W]"""
    generator, pixels = np.random.default_rng(0), {}
    for name in dict.fromkeys(image for segments in PACKS for segment in segments for image in segment.images):
        picture = Image.open(io.BytesIO(tiny.random_png(generator))).resize(
            (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC
        )
        pixels[name] = np.moveaxis(np.asarray(picture), 2, 0)
    return pixels


def assert_is_pack(batch, segments, pixels) -> None:
    """The plain loop: token by token, segment by segment."""
    input_ids, labels, positions = [], [], []
    for segment in segments:
        ids, mask = segment.input_ids.tolist(), segment.loss_mask.tolist()
        for place, token in enumerate(ids):
            follows = place + 1 < len(ids) and mask[place + 1]
            input_ids.append(token)
            labels.append(ids[place + 1] if follows else IGNORE_INDEX)
            positions.append(place)
    assert (
        batch.input_ids.tolist() == input_ids
        and batch.labels.tolist() == labels
        and batch.position_ids.tolist() == positions
    )
    assert batch.segment_lengths.tolist() == [len(segment.input_ids) for segment in segments]
    assert batch.sample_ids == tuple(segment.sample_id for segment in segments)
    assert batch.num_label_tokens == sum(label != IGNORE_INDEX for label in labels) > 0 and not batch.is_filler
    shown = [image for segment in segments for image in segment.images]
    assert len(shown) == len(batch.image_slots) == input_ids.count(IMAGE_TOKEN) / VISUAL_TOKENS
    assert len(batch.pixels) == max(len(set(shown)), min(1, len(batch.pixels))), (
        "each distinct picture once, or one blank"
    )
    for name, slot in zip(shown, batch.image_slots.tolist(), strict=True):
        assert np.array_equal(batch.pixels[slot].numpy(), pixels[name]), name


def same(one, other) -> bool:
    tensors = ("input_ids", "labels", "position_ids", "segment_lengths", "pixels", "image_slots")
    rest = ("sample_ids", "num_label_tokens", "is_filler")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors) and all(
        getattr(one, name) == getattr(other, name) for name in rest
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_ranks_together_load_the_plans_packs_each_as_the_plain_loop_has_it(dataset, world_size):
    plan, pixels = plan_of(dataset, world_size), reference_pixels()
    by_ids = {tuple(segment.sample_id for segment in segments): number for number, segments in enumerate(PACKS)}
    ranks = [list(load(dataset, plan, rank)) for rank in range(world_size)]
    assert [len(steps) for steps in ranks] == [NUM_STEPS] * world_size
    for number, steps in enumerate(zip(*ranks, strict=True)):
        assert [loaded.step for loaded in steps] == [number] * world_size
        assert len({len(loaded.batches) for loaded in steps}) == 1, "a rank without a pack must take part all the same"
        batches = [batch for loaded in steps for batch in loaded.batches]
        found = Counter(by_ids[batch.sample_ids] for batch in batches if not batch.is_filler)
        assert found == Counter(plan.packs_of(number).tolist()) and set(found.values()) == {1}
        assert sum(batch.num_label_tokens for batch in batches) == steps[0].plan.num_label_tokens
        for batch in batches:
            if not batch.is_filler:
                assert_is_pack(batch, PACKS[by_ids[batch.sample_ids]], pixels)
        for position, has_images in enumerate(steps[0].plan.has_images.tolist()):
            together = [loaded.batches[position] for loaded in steps]
            assert all((len(batch.pixels) > 0) == has_images for batch in together), (
                "either every rank runs the ViT or none"
            )
            assert all(not batch.pixels.any() for batch in together if len(batch.image_slots) == 0)


def test_a_filler_has_no_label_and_matches_the_others_collectives(dataset):
    plan = plan_of(dataset, 3)
    step = plan.step(0)
    assert (step.packs == FILLER).sum() == 1
    position, rank = (int(where[0]) for where in np.nonzero(step.packs == FILLER))
    batch = next(iter(load(dataset, plan, rank))).batches[position]
    assert batch.is_filler and batch.num_label_tokens == 0 and (batch.labels == IGNORE_INDEX).all()
    for image in (True, False):
        made = filler(image, READER)
        assert (
            made.is_filler
            and made.pixels.shape == (int(image), 3, IMAGE_SIZE, IMAGE_SIZE)
            and len(made.image_slots) == 0
        )
        assert made.segment_lengths.sum() == len(made.input_ids) == len(made.position_ids)


@pytest.mark.parametrize(("workers", "start_step"), [(0, 4), (1, 0), (2, 3)])
def test_workers_and_a_later_start_change_nothing(dataset, workers, start_step):
    plan = plan_of(dataset, 2)
    whole = list(load(dataset, plan, rank=1))
    some = load(dataset, plan, rank=1, workers=workers, start_step=start_step)
    assert len(some) == NUM_STEPS - start_step
    found = list(some)
    assert [loaded.step for loaded in found] == list(range(start_step, NUM_STEPS))
    for one, other in zip(found, whole[start_step:], strict=True):
        assert all(same(left, right) for left, right in zip(one.batches, other.batches, strict=True))


def test_a_finished_run_has_nothing_to_load(dataset):
    for start_step in (NUM_STEPS, NUM_STEPS + 3):
        rest = load(dataset, plan_of(dataset), start_step=start_step)
        assert len(rest) == 0 and list(rest) == []


def test_a_picture_that_samples_share_is_decoded_once(dataset, monkeypatch):
    decoded: Counter[str] = Counter()

    def counting(data, image_size, max_pixels, where, framing):
        decoded[where] += 1
        return decode(data, image_size, max_pixels, where, framing)

    decode = pictures.decode_image
    monkeypatch.setattr(pictures, "decode_image", counting)
    list(load(dataset, plan_of(dataset, epochs=1.0)))
    assert set(decoded.values()) == {1}
    assert len(decoded) == sum(len({image for segment in segments for image in segment.images}) for segments in PACKS)


def test_loading_draws_nothing_from_the_generator_that_dropout_uses(dataset):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(load(dataset, plan_of(dataset)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_decoded_is_named_with_its_samples(tmp_path, monkeypatch, workers):
    """The shards are whole, so only decoding can notice. What comes before it in the plan is still trained on."""
    pictures = tiny.random_png
    monkeypatch.setattr(tiny, "random_png", lambda generator: pictures(generator)[:200])
    broken = PackedDataset(write_packs(tmp_path / "packs", [PACKS[2], PACKS[4], PACKS[6]]))
    plan = plan_of(broken, packs_per_step=1, epochs=1.0)
    bad_step = int(np.flatnonzero([plan.packs_of(step)[0] == 1 for step in range(3)])[0])
    loaded = iter(load(broken, plan, workers=workers))
    assert [next(loaded).step for _ in range(bad_step)] == list(range(bad_step))
    with pytest.raises(InputError) as caught:
        next(loaded)
    said = str(caught.value)
    assert str(broken.folder) in said and "pack 1" in said and "image 0" in said and PACKS[4][0].sample_id in said
    assert "Traceback" not in said


def test_a_picture_over_the_limit_is_refused_with_the_settings_name(dataset):
    with pytest.raises(InputError, match="max_image_pixels"):
        list(StepLoader(dataset, plan_of(dataset), 0, SquareReader(size=IMAGE_SIZE, max_pixels=100), 0))


def test_a_worker_that_is_killed_ends_the_run_instead_of_halting_it(dataset):
    steps = iter(load(dataset, plan_of(dataset, epochs=400.0), workers=1))
    next(steps)
    workers = steps.gi_frame.f_locals["fetched"]._workers
    os.kill(workers[0].pid, signal.SIGKILL)
    with pytest.raises(InputError, match=r"image worker was killed.*data\.workers"):
        for _ in steps:
            pass


def test_a_process_that_ends_by_an_error_leaves_no_worker_and_waits_for_none(dataset):
    program = (
        "from tests.data.test_loader import load, plan_of, PackedDataset\n"
        "if __name__ == '__main__':\n"
        f"    dataset = PackedDataset({str(dataset.folder)!r})\n"
        "    steps = iter(load(dataset, plan_of(dataset, epochs=400.0), workers=1))\n"
        "    next(steps)\n"
        "    raise SystemExit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 7


def test_batches_are_pinned_where_that_is_asked_for_and_only_there(dataset, monkeypatch):
    """Pinning wants a GPU, so a stand-in tells what would be pinned: all that goes to the device, fillers' too."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    plan = plan_of(dataset, world_size=2)
    for _ in load(dataset, plan, rank=1):
        assert not pinned
    steps = list(StepLoader(dataset, plan, 1, READER, 0, pin_memory=True))
    assert any(batch.is_filler for step in steps for batch in step.batches)
    there = {tensor.data_ptr() for tensor in pinned}
    for batch in (batch for step in steps for batch in step.batches):
        for name in ("input_ids", "labels", "position_ids", "pixels", "image_slots", "instruction_ids"):
            assert getattr(batch, name).data_ptr() in there or not getattr(batch, name).numel()


def first_error(loader: StepLoader) -> str:
    with pytest.raises(InputError) as caught:
        for _ in loader:
            pass
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def no_room(tensor):
    raise RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)")


def no_files(tensor):
    raise OSError(24, "Too many open files")


@pytest.mark.parametrize(
    ("share", "parts"),
    [
        (no_room, ["No space left on device", "/dev/shm", "data.workers 0"]),
        (no_files, ["Too many open files", "ulimit -n"]),
    ],
)
def test_a_worker_that_cannot_share_hands_over_why(dataset, monkeypatch, share, parts):
    fetcher = loader_module._Fetcher(dataset, READER, None)
    number = next(number for number in range(len(dataset)) if len(dataset.row(number).image_ids))
    monkeypatch.setattr(torch.Tensor, "share_memory_", share)
    assert not isinstance(fetcher[number, True], str)  # this process shares nothing
    monkeypatch.setattr(loader_module, "get_worker_info", lambda: "a worker's")
    said = fetcher[number, True]
    assert all(part in said for part in parts), said


class Unreadable(PackedDataset):
    error: Exception = OSError(5, "Input/output error", "packs-00000.arrow")

    def row(self, number):
        raise self.error


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error", "packs-00000.arrow"), MemoryError("Unable to allocate 9 GiB")]
)
def test_a_pack_that_cannot_be_read_is_one_line(dataset, error):
    unreadable = Unreadable(dataset.folder)
    unreadable.error = error
    said = first_error(load(unreadable, plan_of(dataset)))
    assert str(dataset.folder) in said and error.args[-1] in said and "cannot be read" in said


def test_what_fails_in_a_worker_is_told_by_the_trainer(dataset):
    assert "Input/output error" in first_error(load(Unreadable(dataset.folder), plan_of(dataset), workers=1))


class Hanging(PackedDataset):
    def row(self, number):
        time.sleep(600)


def test_who_waits_for_workers_that_hang_is_asked_again_and_again(dataset, monkeypatch):
    monkeypatch.setattr(loader_module, "POLL_SECONDS", 0.1)
    asked = []

    def leave():
        asked.append(1)
        if len(asked) == 3:
            raise InputError("long enough")

    loader = load(Hanging(dataset.folder), plan_of(dataset), workers=1)
    loader.while_waiting = leave
    assert first_error(loader) == "long enough" and len(asked) == 3


@pytest.mark.slow
def test_workers_end_with_a_trainer_that_is_killed(dataset, tmp_path):
    program = (
        "import time\n"
        "from tests.data.test_loader import Hanging, load, plan_of\n"
        "if __name__ == '__main__':\n"
        f"    dataset = Hanging({str(dataset.folder)!r})\n"
        "    loader = load(dataset, plan_of(dataset), workers=1)\n"
        "    fetched = loader._start()\n"
        "    print(fetched._workers[0].pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    (tmp_path / "program.py").write_text(program)
    with subprocess.Popen(
        [sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as trainer:
        worker = psutil.Process(int(trainer.stdout.readline()))
        time.sleep(2.5)  # until it is at work
        assert worker.is_running()
        trainer.kill()
    assert psutil.wait_procs([worker], timeout=10)[1] == []
