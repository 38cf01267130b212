"""The history: every sample's loss of every step, in an order that ranks and ZeRO stages do not change, readable after
a kill at any byte, and proven from the receipt."""

import json
import shutil

import numpy as np
import pytest
import torch

from tests.support.processes import run_ranks
from tests.support.reading import squares
from tests.support.tiny import make_segments, tiny_config, write_packs
from vltrain.data.flat.index import Index
from vltrain.data.loader import collate
from vltrain.data.plan import FILLER, PackCost, Plan
from vltrain.data.shards import PackedDataset
from vltrain.errors import InputError
from vltrain.models.build import build_model
from vltrain.programs.check import main
from vltrain.receipts.history import HISTORY, HistoryWriter, read_history
from vltrain.receipts.receipt import RECEIPT
from vltrain.receipts.verify import prove

STEPS = [np.array([0.5, np.nan, 2.25], np.float32), np.array([1.0], np.float32), np.array([3.0, 4.0], np.float32)]
RUN = {"run": "r" * 64, "data": "d" * 64}
NUM_STEPS = 4


def write(folder, steps, first_step=0, **changes):
    writer = HistoryWriter(folder, **{**RUN, **changes}, active=True, first_step=first_step)
    for losses in steps:
        writer.add(losses)
    writer.sync()
    writer.close()


def test_a_kill_at_any_byte_loses_its_own_step_alone(tmp_path):
    write(tmp_path, STEPS)
    path = tmp_path / HISTORY
    whole = path.read_bytes()
    header = whole.index(b"\n") + 1
    assert len(whole) - header == 4 * sum(1 + len(losses) for losses in STEPS)  # 4 bytes a loss, and 4 a step
    ends = header + np.cumsum([0] + [4 * (1 + len(losses)) for losses in STEPS])
    for length in range(header, len(whole) + 1):
        path.write_bytes(whole[:length])
        found = read_history(tmp_path)
        assert found.num_steps == np.searchsorted(ends, length, side="right") - 1
        assert found.cut_short == (length not in ends)
        for step in range(found.num_steps):
            np.testing.assert_array_equal(found.losses(step), STEPS[step])
        if found.num_steps:  # a checkpoint was written after the first step
            write(tmp_path, STEPS[1:], first_step=1)
            assert path.read_bytes() == whole


def test_a_run_without_history_begins_one_where_it_goes_on(tmp_path, caplog):
    write(tmp_path, STEPS[1:], first_step=1)
    assert "history.bin: begins at step 1" in caplog.text
    found = read_history(tmp_path)
    assert (found.first_step, found.num_steps) == (1, 2)
    np.testing.assert_array_equal(found.losses(2), STEPS[2])
    with pytest.raises(InputError, match="step 0: not in it, it holds steps 1 to 2"):
        found.losses(0)
    write(tmp_path, STEPS[2:], first_step=2)
    assert read_history(tmp_path).num_steps == 2
    write(tmp_path, STEPS, first_step=0)  # an earlier checkpoint than it begins at
    assert (read_history(tmp_path).first_step, read_history(tmp_path).num_steps) == (0, 3)


def test_what_is_no_history_of_the_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="history.bin: cannot be read .no such file.; expected the history of a run"):
        read_history(tmp_path)
    write(tmp_path, STEPS)
    for changes in ({"run": "s" * 64}, {"data": "e" * 64}):
        with pytest.raises(InputError, match="the history of another run; restore it, or remove it"):
            write(tmp_path, [], first_step=1, **changes)
    with pytest.raises(InputError, match="it ends after 3 step.s.; the checkpoint has 4 behind it"):
        write(tmp_path, [], first_step=4)
    header = json.dumps({"history": 2, **RUN, "first_step": 0}).encode() + b"\n"
    for content in (b"", b"\n", b"[]\n", b"\xff\n", b'{"history": 1}\n', header, header[:-1], b"x" * 70_000):
        (tmp_path / HISTORY).write_bytes(content)
        with pytest.raises(InputError, match="history.bin"):
            read_history(tmp_path)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_packs", [3, 7, 23])  # of 3 packs a step has some twice
def test_each_rank_knows_where_its_samples_stand(world_size, num_packs):
    sizes = np.random.default_rng(1).integers(1, 5, num_packs)
    index = Index(
        num_samples=sizes,
        num_images=sizes % 2,
        num_tokens=sizes * 9,
        num_label_tokens=sizes,
        sum_squares=sizes * 81,
    )
    plan = Plan(index, seed=3, epochs=4.0, packs_per_step=5, world_size=world_size, cost=PackCost())
    for number in range(plan.num_steps):
        step = plan.step(number)
        order = [(pack, place) for pack in plan.packs_of(number).tolist() for place in range(sizes[pack])]
        found = [None] * step.num_samples
        for pack, first in zip(step.packs.ravel().tolist(), step.first_samples.ravel().tolist(), strict=True):
            for place in range(0 if pack == FILLER else sizes[pack]):
                assert found[first + place] is None
                found[first + place] = (pack, place)
        assert found == order


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run, plain on one rank and under ZeRO-3 on two; of three packs a step one rank has two."""
    folder = tmp_path_factory.mktemp("history")
    packs = write_packs(folder / "packs", make_segments(7))
    for name, stage, world_size in (("plain", 0, 1), ("zero3", 3, 2)):
        zero = {"stage": stage, "reduce_bucket_size": 500}
        changes = {"train__packs_per_step": 3, "train__max_steps": NUM_STEPS, "train__epochs": 3.0}
        scenario = {"name": name, "packs": str(packs), "output": str(folder / name), "changes": changes}
        scenarios = folder / f"{name}.json"
        scenarios.write_text(json.dumps([{**scenario, "ds": {"zero_optimization": zero}}]))
        run_ranks("tests.train.worker", [str(scenarios)], world_size, folder / "log")
    return folder


def test_the_history_is_each_samples_own_loss(runs):
    dataset = PackedDataset(runs / "packs")
    config = tiny_config()
    model = build_model(config.model, dtype=torch.float32)
    reader = squares(model)
    plan = Plan(dataset.index, seed=0, epochs=3.0, packs_per_step=3, world_size=1, cost=PackCost())
    expected = []
    for pack in plan.packs_of(0).tolist():  # before the first update
        row = dataset.row(pack)
        pictures = [reader.decode(dataset.image(image), "a test") for image in row.image_ids.tolist()]
        batch = collate(row, pictures, reader)
        expected.append((model(batch).segment_losses / batch.segment_labels()).numpy())
    for name in ("plain", "zero3"):
        np.testing.assert_allclose(read_history(runs / name).losses(0), np.concatenate(expected), rtol=1e-5)


def test_ranks_and_stages_do_not_change_it(runs):
    plain, zero3 = (read_history(runs / name) for name in ("plain", "zero3"))
    assert plain.num_steps == zero3.num_steps == NUM_STEPS and plain.run == zero3.run
    for step in range(NUM_STEPS):
        assert len(np.unique(plain.losses(step))) > 3
        np.testing.assert_allclose(zero3.losses(step), plain.losses(step), rtol=1e-4)


def test_it_agrees_with_the_receipt(runs, tmp_path, capsys):
    for name in ("plain", "zero3"):
        (fact,) = (fact for fact in prove(runs / name, None).facts if fact.startswith("history: "))
        assert "losses, each step's sum is the receipt's to " in fact
    one = tmp_path / "run"
    shutil.copytree(runs / "zero3", one)
    path = one / HISTORY
    whole, history = path.read_bytes(), read_history(one)

    def failure():
        assert main(["resume", str(one)]) == 1
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED"))
        return line

    changed = bytearray(whole)
    place = history.end_of(2) - 4
    changed[place : place + 4] = np.float32(9.0).tobytes()
    path.write_bytes(changed)
    assert "history: step 1: its losses add up to" in failure()
    path.write_bytes(whole[: history.end_of(3) - 2])
    assert "history: ends after 2 step(s), the receipt has 4" in failure()
    shutil.copy(runs / "plain" / HISTORY, path)
    assert main(["resume", str(one)]) == 0  # the same run
    path.write_bytes(whole.replace(history.run.encode(), b"0" * 64))
    assert "the history of another run" in failure()
    path.unlink()
    assert main(["resume", str(one)]) == 0 and "history: not recorded" in capsys.readouterr().out
    path.write_bytes(b"nothing")
    assert main(["resume", str(one)]) == 2


def test_a_step_with_one_sample_more_or_less_is_found(runs, tmp_path):
    shutil.copytree(runs / "plain", tmp_path / "run")
    history = read_history(runs / "plain")
    write(
        tmp_path / "run",
        [history.losses(0), history.losses(1)[:-1], *(history.losses(step) for step in (2, 3))],
        run=history.run,
        data=history.data,
    )
    (failure,) = prove(tmp_path / "run", None).failures
    assert failure.startswith("history: step 1: ") and "the plan has" in failure
    assert (tmp_path / "run" / RECEIPT).exists()
