"""`bash tests/gpu.sh`: what emulation shows on a CPU, the page, and what happens to parts that fail or hang."""

import json
import subprocess
import sys

import psutil
import pytest

from tests.gpu import __main__ as script
from tests.gpu.page import write_page
from tests.gpu.part import Findings
from tests.gpu.weights import drawn_on_device
from tests.support.processes import ROOT


def run(*words: str, timeout_seconds: float = 600) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "tests/gpu.sh", *words], cwd=ROOT, capture_output=True, text=True, timeout=timeout_seconds
    )


QUICK = ("kernels", "bits")


@pytest.mark.parametrize(
    "parts",
    [QUICK, *(pytest.param((name,), marks=pytest.mark.slow) for name in script.EMULATED if name not in QUICK)],
    ids="-".join,
)
def test_emulation_passes_and_leaves_a_page(tmp_path, parts):
    done = run("--emulate", "--part", *parts, "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == [name for name in script.PARTS if name in parts]
    for name, part in found.items():
        assert part["failures"] == [] and part["emulated"] and all(part["tables"].values()), name
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"## {name}\n" in page for name in parts) and "Emulated on a CPU" in page and "FAILED" not in page
    stages = found.get("equivalence", {"tables": {}})["tables"].get("losses beside the plain loop's in fp32", [])
    assert len(stages) == (8 if "equivalence" in parts else 0)
    for row in stages:  # ZeRO 3's hooks add gradients in another order, which the part allows 1e-4
        assert row["as_zero_0"] == "bit for bit" or row["stage"] == 3, row


def test_a_part_named_with_a_dot_has_a_file_of_its_own(tmp_path):
    for name in ("LLaMA-1.1B-text", "LLaMA-1.1B-scienceqa"):
        Findings(emulate=True, folder=tmp_path / name).row("table", of=name)
        assert json.loads((tmp_path / f"{name}.json").read_text())["tables"] == {"table": [{"of": name}]}


def test_without_a_gpu_it_says_what_to_do():
    done = run("--part", "speed")
    assert done.returncode == 2 and "no CUDA device here; --emulate" in done.stderr
    done = run("--emulate", "--part", "speed")
    assert done.returncode == 2 and "speed need a GPU" in done.stderr


def test_weights_are_drawn_where_networks_get_them():
    with drawn_on_device():
        pass


def test_all_parts_are_listed():
    done = run("--list")
    assert done.returncode == 0 and [line.split()[0] for line in done.stdout.splitlines()] == list(script.PARTS)
    assert all((ROOT / "tests" / "gpu" / f"{name}.py").exists() for name in script.PARTS)


BROKEN = {
    "hangs": (
        "import subprocess, time\nfindings.row('table', of='it')\nchild = subprocess.Popen(['sleep', '600'], "
        "start_new_session=True)\n"
        "(findings.folder / 'child').write_text(str(child.pid))\ntime.sleep(60)"
    ),
    "raises": "findings.row('table', of='it')\nraise RuntimeError('no such kernel')",
    "dies": "findings.row('table', of='it')\nimport os\nos._exit(11)",
}


@pytest.mark.parametrize(
    ("how", "told"), [("hangs", "ran past its"), ("raises", "no such kernel"), ("dies", "ended with 11")]
)
def test_a_part_that_is_cut_short_keeps_what_it_had_found(tmp_path, monkeypatch, how, told):
    body = "\n".join(f"    {line}" for line in BROKEN[how].splitlines())
    module = tmp_path / "stand_in.py"
    module.write_text(
        "import sys\nfrom tests.gpu.part import run_part\n\ndef "
        f"find(findings):\n{body}\n\nsys.exit(run_part('broken', find, ''))\n"
    )
    start = subprocess.Popen

    def stand_in(command, **named):
        return start([sys.executable, str(module), *command[3:]], **named)

    monkeypatch.setitem(script.PARTS, "broken", "a part that breaks")
    monkeypatch.setattr(script.subprocess, "Popen", stand_in)
    assert not script._run("broken", tmp_path, True, limit=12 if how == "hangs" else 60)
    found = json.loads((tmp_path / "broken.json").read_text())
    assert found["tables"] == {"table": [{"of": "it"}]}
    assert len(found["failures"]) == 1 and told in found["failures"][0]
    if how == "hangs":
        assert not psutil.pid_exists(int((tmp_path / "broken" / "child").read_text())), "what it started goes on"


@pytest.mark.parametrize(("found", "good"), [(0.5, True), (1.5, False), (float("nan"), False)])
def test_what_is_above_its_limit_or_not_a_number_fails(tmp_path, found, good):
    findings = Findings(emulate=True, folder=tmp_path / "part")
    findings.check("table", found, 1.0, of="it")
    write_page(tmp_path, ["part"])
    page = (tmp_path / "gpu.md").read_text()
    assert (findings.failures == []) == good and ("FAILED" not in page) == good
