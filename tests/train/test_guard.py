"""A loss that is not a number stops the run one step later at most, names its samples, and is never saved."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch
from vltrain.errors import InputError
from vltrain.train.zero.engine import init_distributed, shutdown_distributed
from vltrain.train.guard import LossGuard, StepResult

rank, world_size = init_distributed()
seen = []
FIELDS = ("step", "loss", "grad_norm", "lr", "label_tokens", "samples")
losses_seen = []

def note(read):
    seen.append(tuple(getattr(read, name) for name in FIELDS))
    losses_seen.append(read.sample_losses)

guard = LossGuard(note)

def result(step, losses, grad_norm=1.0):
    return StepResult(
        step=step, losses=[torch.tensor(sum(losses))], segment_losses=[torch.tensor(losses)],
        segment_labels=[torch.tensor([2, 2])], sample_ids=[(f"r{rank}a", f"r{rank}b")], num_label_tokens=4,
        own_label_tokens=4, places=[2 * rank], num_samples=2 * world_size, samples=(1, 2**32 - 1, 3, 4),
        grad_norm=grad_norm, lr=0.1,
    )

guard.push(result(0, [1.0, 1.0]))
assert seen == []  # one step late
guard.push(result(1, [2.0, 2.0]))
assert seen == [(0, 0.5 * world_size, 1.0, 0.1, 4 * world_size, "00000001ffffffff0000000300000004")], seen
assert losses_seen[0].tolist() == [0.5, 0.5] * world_size
kind = sys.argv[1]
bad = {"sample": [1.0, float("nan") if rank == world_size - 1 else 1.0], "gradient": [3.0, 9.0 + rank]}[kind]
guard.push(result(2, bad, float("inf") if kind == "gradient" else 1.0))
assert [values[0] for values in seen] == [0, 1]
try:
    guard.flush()
    print("not noticed")
except InputError as error:
    print(f"RANK{rank}: {error}")
shutdown_distributed()
"""


def stop_message(kind: str) -> str:
    """What a single process says of a bad third step."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-c", SCRIPT, kind], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_sample_behind_a_nan_is_named():
    message = stop_message("sample")
    assert (
        "RANK0: step 2: loss nan" in message
        and "not finite: sample(s) r0b nan" in message
        and "--resume auto" in message
    )
    assert "vltrain check replay RUN --step 2" in message


def test_a_gradient_that_is_not_finite_names_the_largest_losses():
    message = stop_message("gradient")
    assert "gradient norm inf" in message and "per label token largest: sample(s) r0b 4.5, r0a 1.5" in message


@pytest.mark.parametrize("content", ["", '{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st', '{"step": 0}\n{"step": 1}\n'])
def test_the_log_goes_on_where_the_checkpoint_is(tmp_path, content):
    from vltrain.metrics.monitor import _reopen_log

    path = tmp_path / "log.jsonl"
    path.write_text(content)
    log = _reopen_log(path, 2)
    log.write('{"step": 2, "new": 1}\n')
    log.close()
    kept = '{"step": 0}\n{"step": 1}\n' if content else ""
    assert path.read_text() == kept + '{"step": 2, "new": 1}\n'
