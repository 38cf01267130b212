"""Digests of frozen weights in a receipt: part of its chain, absent from those of earlier versions, and compared where
a run goes on."""

from dataclasses import replace

import pytest

from tests.receipts.test_receipt import facts_of, header_of
from tests.support.tiny import make_segments, write_packs
from vltrain.data.shards import PackedDataset
from vltrain.receipts.receipt import RECEIPT, ReceiptWriter, read_receipt
from vltrain.receipts.verify import prove

START = {"llm/bfloat16": "a" * 16, "vision/bfloat16": "b" * 16}
MOVED = {**START, "vision/bfloat16": "c" * 16}
FP32 = {"llm/float32": "d" * 16, "vision/float32": "e" * 16}


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    return PackedDataset(write_packs(tmp_path_factory.mktemp("frozen") / "packs", make_segments(7)))


def write(packs, folder, steps, now, *, head=None, saved=None):
    """A life of a run that finds the weights `now`; at the steps of `saved` a checkpoint follows."""
    folder.mkdir(exist_ok=True)
    header = replace(header_of(packs), frozen=now)
    writer = ReceiptWriter(folder, header, active=True, first_step=steps[0], head=head)
    for step in steps:
        frozen = saved.get(step) if saved else None
        writer.add(step=step, loss=1.0 / (step + 3), frozen=frozen, **facts_of(packs, step))
    writer.close()
    return writer.head


def said(folder):
    proof = prove(folder, None)
    (line,) = (one for one in (*proof.facts, *proof.failures) if one.startswith("frozen weights: "))
    assert (line in proof.failures) == (" moved " in line)
    return line.removeprefix("frozen weights: ")


def test_unmoved_and_moved(packs, tmp_path):
    write(packs, tmp_path, range(5), START, saved={1: START, 3: START, 4: START})
    assert said(tmp_path) == "llm, vision as at the start at each of 3 checkpoint(s)"
    write(packs, tmp_path, range(5), START, saved={1: START, 3: MOVED, 4: START})
    assert said(tmp_path) == "vision (bfloat16) moved between step 2 and the checkpoint of step 4"
    write(packs, tmp_path, range(5), {}, saved={1: {}})
    assert said(tmp_path) == "there are none"


def test_they_are_chained(packs, tmp_path):
    write(packs, tmp_path, range(5), START, saved={1: START, 4: MOVED})
    path = tmp_path / RECEIPT
    text = path.read_text()
    path.write_text(text.replace(MOVED["vision/bfloat16"], START["vision/bfloat16"]))
    assert "step 4 does not follow" in read_receipt(path).problem
    path.write_text(text.replace(START["llm/bfloat16"], "0" * 16))
    assert "step 0 does not follow" in read_receipt(path).problem
    path.write_text(text.replace(f'"{MOVED["vision/bfloat16"]}"', "3"))
    assert "expected digests by part" in read_receipt(path).problem


def test_a_run_goes_on_with_the_same_others_or_another_precision(packs, tmp_path, caplog):
    saved = {1: START, 4: START}
    write(packs, tmp_path / "whole", range(5), START, saved=saved)
    head = write(packs, tmp_path / "run", range(2), START, saved=saved)
    write(packs, tmp_path / "run", range(2, 5), START, head=head, saved=saved)
    assert (tmp_path / "run" / RECEIPT).read_bytes() == (tmp_path / "whole" / RECEIPT).read_bytes()
    assert caplog.text == ""
    write(packs, tmp_path / "run", range(2, 5), MOVED, head=head, saved={4: MOVED})
    assert "goes on with other frozen weights than before: vision/bfloat16" in caplog.text
    assert said(tmp_path / "run") == "vision (bfloat16) moved between step 2 and the checkpoint of step 3"
    caplog.clear()
    write(packs, tmp_path / "run", range(2, 5), FP32, head=head, saved={4: FP32})
    assert caplog.text == "" and said(tmp_path / "run") == "llm, vision as at the start at each of 3 checkpoint(s)"
    write(packs, tmp_path / "run", range(2, 5), FP32, head=head, saved={4: {**FP32, "llm/float32": "f" * 16}})
    assert said(tmp_path / "run") == "llm (float32) moved between step 3 and the checkpoint of step 5"


def test_receipts_of_earlier_versions(packs, tmp_path):
    head = write(packs, tmp_path, range(2), None)
    assert '"frozen"' not in (tmp_path / RECEIPT).read_text()
    assert said(tmp_path) == "not recorded (a run of an earlier version)"
    write(packs, tmp_path, range(2, 5), START, head=head, saved={4: START})
    assert said(tmp_path) == "llm, vision as at step 3 at each of 1 checkpoint(s)"
