"""The README's first command, from a fresh clone with an environment of its own: one line at the end, a model that
answers, and its exports."""

import os
import re
import subprocess

import pytest

from tests.support.processes import ROOT


@pytest.mark.slow
def test_the_quickstart_from_a_fresh_clone(tmp_path):
    """Takes minutes, most of them for the environment, which comes from the package index. What is committed is what is
    tried."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(clone)], check=True)
    outside = ("PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in outside}
    done = subprocess.run(
        ["bash", "launch/quickstart.sh"], cwd=clone, env=environment, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.splitlines()[-1]
    found = re.fullmatch(r"quickstart: accuracy=(\d\.\d{4}) \((\d+) questions\) seconds=\d+", last)
    assert found, last
    assert float(found[1]) >= 0.95 and int(found[2]) == 9673
    asked = done.stdout.split("quickstart: .venv/bin/vltrain ask ", 1)[1].splitlines()
    assert (
        asked[0].startswith("runs/quickstart --image data/easyvqa/samples/") and asked[1] == "quickstart: triangle"
    ), asked[:2]
    again = subprocess.run(
        ["bash", "launch/quickstart.sh"], cwd=clone, env=environment, capture_output=True, text=True, timeout=3000
    )
    assert again.returncode == 0 and again.stdout.splitlines()[-1].startswith(f"quickstart: accuracy={found[1]} "), (
        "run again, it says the same"
    )
    vltrain = str(clone / ".venv" / "bin" / "vltrain")
    for form in ("mmt", "lora", "merged", "adapters"):
        words = [vltrain, "export", "runs/quickstart", "--output", str(tmp_path / form), "--format", form]
        exported = subprocess.run(words, cwd=clone, env=environment, capture_output=True, text=True, timeout=600)
        assert exported.returncode == 0 and "8 of 8 answers equal" in exported.stdout, exported.stderr[-3000:]
    changed = subprocess.run(
        ["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True
    ).stdout
    assert changed == "", "the quickstart leaves the tracked tree as it was"
