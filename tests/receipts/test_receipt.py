"""The receipt: no line can be changed, left out, moved or added unnoticed, and a killed run's is taken up where its
checkpoint is."""

import json
import random
import re
from dataclasses import asdict, replace

import pytest

from tests.support.tiny import make_segments, write_packs
from tests.train.checkpoints.test_checkpoint import Net, flipped_byte, newer_format, state_of
from vltrain.config.recipe import build_config, dump_config
from vltrain.data.plan import PackCost, Plan
from vltrain.data.shards import PackedDataset
from vltrain.errors import InputError
from vltrain.programs.check import main
from vltrain.receipts.receipt import (
    RECEIPT,
    Header,
    ReceiptWriter,
    fingerprint,
    pack_fingerprint,
    read_receipt,
    samples_text,
)
from vltrain.receipts.verify import prove
from vltrain.train.checkpoints.checkpoint import save_checkpoint

PER_STEP, EPOCHS = 3, 2.0


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    return PackedDataset(write_packs(tmp_path_factory.mktemp("receipt") / "packs", make_segments(7)))


def header_of(packs):
    plan = plan_of(packs)
    told = {"seed": 5, "epochs": EPOCHS, "packs_per_step": PER_STEP, "num_steps": plan.num_steps}
    return Header(run="r" * 64, data=packs.manifest.checksum, packs=str(packs.folder), **told)


def plan_of(packs, world_size=1):
    return Plan(packs.index, seed=5, epochs=EPOCHS, packs_per_step=PER_STEP, world_size=world_size, cost=PackCost())


def facts_of(packs, step, world_size=1):
    """What the ranks count in a step, each in its own packs."""
    share = [
        [pack for pack in column if pack >= 0] for column in plan_of(packs, world_size).step(step).packs.T.tolist()
    ]
    sums = [fingerprint(packs.sample_ids(pack) for pack in own) for own in share]
    labels = sum(int(packs.index.num_label_tokens[pack]) for own in share for pack in own)
    return {"samples": samples_text(map(sum, zip(*sums))), "label_tokens": labels}


def write(packs, folder, steps, head=None, first_step=0, world_size=1, loss=lambda step: 1.0 / (step + 3), **changes):
    folder.mkdir(exist_ok=True)
    writer = ReceiptWriter(folder, header_of(packs), active=True, first_step=first_step, head=head)
    for step in steps:
        writer.add(
            **{"step": step, "loss": loss(step), **facts_of(packs, step, world_size), **changes.get(f"step_{step}", {})}
        )
    writer.sync()
    writer.close()
    return writer.head


def test_a_whole_run_is_proven(packs, tmp_path, capsys):
    write(packs, tmp_path / "run", range(5))
    assert main(["resume", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert (
        "chain: 5 of 5 steps" in shown
        and f"pass 0: {packs.manifest.num_samples} of {packs.manifest.num_samples} samples once" in shown
    )
    assert "pass 1" in shown and "FAILED" not in shown


def test_the_fingerprint_of_a_step_does_not_depend_on_who_had_which_pack(packs):
    assert [facts_of(packs, step, 1) for step in range(5)] == [facts_of(packs, step, 2) for step in range(5)]
    assert len({facts_of(packs, step)["samples"] for step in range(5)}) == 5
    assert pack_fingerprint(["a", "b"]) != pack_fingerprint(["b", "a"]) != pack_fingerprint(["ab"])


def test_a_killed_run_goes_on_at_its_checkpoint(packs, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write(packs, whole, range(5))
    head = write(packs, broken, range(2))
    write(packs, broken, (2, 3), head=head, first_step=2, loss=lambda step: 99.0)  # lost with the kill
    with (broken / RECEIPT).open("a") as file:
        file.write('{"step": 4, "sam')
    assert read_receipt(broken / RECEIPT).cut_short
    write(packs, broken, range(2, 5), head=head, first_step=2)
    assert (broken / RECEIPT).read_bytes() == (whole / RECEIPT).read_bytes()
    assert main(["resume", str(broken), str(whole)]) == 0


def test_every_changed_byte_breaks_the_chain(packs, tmp_path):
    head = write(packs, tmp_path, range(5))
    path = tmp_path / RECEIPT
    original = path.read_bytes()
    generator = random.Random(1)
    end = len(original) - 1  # a last line without its end is cut short, which is no damage
    for position in generator.sample(range(end), 150):
        damaged = bytearray(original)
        damaged[position] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read_receipt(path)
        except InputError:
            continue
        assert found.problem is not None or found.chain_at(5) != head, position
        with pytest.raises(InputError, match="remove it"):
            ReceiptWriter(tmp_path, header_of(packs), active=True, first_step=5, head=head)
    path.write_bytes(original)
    ReceiptWriter(tmp_path, header_of(packs), active=True, first_step=5, head=head).close()


@pytest.mark.parametrize("change", ["drop", "swap", "repeat", "rewrite", "foreign"])
def test_a_receipt_that_was_tampered_with_is_refused(packs, tmp_path, change):
    head = write(packs, tmp_path, range(5))
    path = tmp_path / RECEIPT
    lines = path.read_text().splitlines(keepends=True)
    if change == "rewrite":  # anew, so that its chain is whole
        write(packs, tmp_path, range(5), loss=lambda step: 0.25)
        assert read_receipt(path).problem is None
    elif change == "foreign":
        path.write_text("".join([json.dumps(asdict(replace(header_of(packs), run="s" * 64))) + "\n", *lines[1:]]))
    else:
        kept = {
            "drop": [*lines[:2], *lines[3:]],
            "swap": [lines[0], lines[2], lines[1], *lines[3:]],
            "repeat": [*lines[:3], *lines[2:]],
        }[change]
        path.write_text("".join(kept))
        assert main(["resume", str(tmp_path)]) == 1
    with pytest.raises(InputError, match="remove it"):
        ReceiptWriter(tmp_path, header_of(packs), active=True, first_step=5, head=head)


def test_a_lost_receipt_begins_anew_and_says_so(packs, tmp_path, caplog):
    head = write(packs, tmp_path, range(2))
    (tmp_path / RECEIPT).unlink()
    write(packs, tmp_path, range(2, 5), head=head, first_step=2)
    assert "a new receipt starts at step 2" in caplog.text
    assert prove(tmp_path, None).failures == ["begins at step 2: the receipt of the steps before was lost"]


def test_other_samples_or_labels_than_the_plans_are_found(packs, tmp_path):
    for name, change, told in (
        ("a", {"samples": "0" * 32}, "other samples"),
        ("b", {"label_tokens": 1}, "1 label tokens"),
    ):
        write(packs, tmp_path / name, range(5), step_3=change)
        (failure,) = prove(tmp_path / name, None).failures
        assert failure.startswith("step 3") and told in failure


def test_two_runs_are_compared(packs, tmp_path, capsys):
    write(packs, tmp_path / "one", range(5))
    write(packs, tmp_path / "near", range(5), loss=lambda step: 1.0 / (step + 3) * (1 + (step == 2) * 1e-7))
    write(packs, tmp_path / "short", range(4))
    one, near = str(tmp_path / "one"), str(tmp_path / "near")
    assert main(["resume", one, near]) == 1 and "FAILED  step 2: loss" in capsys.readouterr().out
    assert main(["resume", one, near, "--tolerance", "1e-6"]) == 0
    assert main(["resume", one, str(tmp_path / "short")]) == 1 and "5 steps" in capsys.readouterr().out


def test_a_sample_that_is_packed_twice_is_named(tmp_path):
    segments = make_segments(3)
    segments[2][0] = replace(segments[2][0], sample_id="p0s1")
    packs = PackedDataset(write_packs(tmp_path / "packs", segments))
    write(packs, tmp_path / "run", range(2))
    assert "the packs hold a sample twice: 'p0s1'" in prove(tmp_path / "run", None).failures


@pytest.mark.parametrize(
    "words",
    [
        ["resume"],
        ["resume", "nowhere"],
        ["resum", "x"],
        ["resume", "x", "--pack", "y"],
        ["resume", "x", "--tolerance", "much"],
    ],
)
def test_mistakes_end_with_2(words, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_other_packs_are_refused(packs, tmp_path):
    write(packs, tmp_path / "run", range(5))
    other = write_packs(tmp_path / "packs", make_segments(5, seed=9))
    with pytest.raises(InputError, match="--packs"):
        prove(tmp_path / "run", other)


@pytest.mark.parametrize("text", [b"", b"{}\n", b"[" * 20000 + b"\n", b'{"receipt": 1}\n', b"\xff\xfe\n", b"1" * 70000])
def test_what_is_no_receipt_is_refused(tmp_path, text):
    (tmp_path / RECEIPT).write_bytes(text)
    with pytest.raises(InputError, match="line 1"):
        read_receipt(tmp_path / RECEIPT)


def saved(packs, folder, steps, until, **run_state):
    """A run with a receipt of so many steps and a checkpoint after `until` of them. Returns that checkpoint's
    folder."""
    head = write(packs, folder, range(until))
    write(packs, folder, range(until, steps), head=head, first_step=until)
    (folder / "config.yaml").write_text(dump_config(build_config({"train.save_every_steps": 2})))
    state = {"receipt": head, "run": "r" * 64, **run_state}
    return save_checkpoint(
        state_of(Net()), folder / "checkpoints", step=until, belongs_to={}, keep=2, is_writer=True, run_state=state
    )


def cut_to(folder, num_steps):
    lines = (folder / RECEIPT).read_text().splitlines(keepends=True)
    (folder / RECEIPT).write_text("".join(lines[: 1 + num_steps]))


def test_a_receipt_that_ends_where_its_checkpoint_does_is_proven(packs, tmp_path):
    saved(packs, tmp_path / "finished", 5, 5)
    assert "end: step-00000005 holds its chain" in prove(tmp_path / "finished", None).facts
    saved(packs, tmp_path / "killed", 5, 3)
    proof = prove(tmp_path / "killed", None)
    assert proof.failures == [] and "2 step(s) after it are not saved" in proof.facts[-1]
    write(packs, tmp_path / "alone", range(5))
    assert "end: no checkpoint to compare it with" in prove(tmp_path / "alone", None).facts


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda run, path: cut_to(run, 3), "steps 0 to 3, .*step-00000005 has 5 behind it"),
        (lambda run, path: cut_to(run, 0), "steps 0 to 0"),
        (lambda run, path: (run / RECEIPT).write_text((run / RECEIPT).read_text()[:-9]), "steps 0 to 4"),
        (lambda run, path: flipped_byte(path), "none of its checkpoints can be used: .*SHA-256"),
        (lambda run, path: newer_format(path), "none of its checkpoints can be used: .*format 2"),
    ],
)
def test_a_finished_run_with_less_than_its_steps_fails(packs, tmp_path, spoil, told, capsys):
    spoil(tmp_path / "run", saved(packs, tmp_path / "run", 5, 5))
    assert main(["resume", str(tmp_path / "run")]) == 1
    assert re.search(f"FAILED  .*{told}", capsys.readouterr().out)


def test_checkpoints_that_are_not_the_receipts_fail(packs, tmp_path):
    saved(packs, tmp_path / "behind", 5, 2)  # it saves every two steps: one of step 4 was there
    saved(packs, tmp_path / "other", 5, 5, receipt="0" * 64)
    saved(packs, tmp_path / "foreign", 5, 5, run="s" * 64)
    for name, told in (
        ("behind", "newest usable checkpoint is of step 2"),
        ("other", "after 5 step"),
        ("foreign", "receipt of another run"),
    ):
        (failure,) = prove(tmp_path / name, None).failures
        assert told in failure
