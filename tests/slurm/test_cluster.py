"""The real sbatch files on a real Slurm of two nodes: both train, a requeued job and one whose node has died end as an
undisturbed one, bit for bit, and data prepared by a job array is that of one process.
`bash tests/run.sh -m slow tests/slurm -s` prints the times."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.slurm.cluster import Cluster, missing
from tests.support.processes import ROOT
from vltrain.receipts.verify import prove

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
STEPS, AWAY_AFTER = 60, 15


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def submit(cluster: Cluster, folder: Path, name: str) -> str:
    words = [
        "--recipe",
        str(ROOT / "launch" / "recipes" / "quickstart.yaml"),
        "--ds",
        str(ROOT / "ds_configs" / "zero2.json"),
        "--nodes",
        "2",
        "--gpus-per-node",
        "0",
        "--ranks-per-node",
        "1",
        "--time",
        "30",
        "--output",
        str(folder / name),
        "--data.root",
        str(folder / "data"),
        "--data.source",
        "shapes",
        "--train.max_steps",
        str(STEPS),
        "--train.epochs",
        "50",
        "--train.eval_every_steps",
        "0",
        "--train.save_every_steps",
        "20",
        "--eval.max_samples",
        "16",
        "--train.precision",
        "fp32",
    ]
    environment = {**cluster.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "submit.py"), *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return re.search(r"^job (\d+):", done.stdout).group(1)


def steps_of(run: Path) -> int:
    log = run / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def wait(run: Path, what, seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        logs = "\n".join(
            f"--- {path.name}\n{path.read_text()[-1500:]}" for path in sorted((run / "logs").glob("*.log"))
        )
        assert time.monotonic() < deadline, logs
        time.sleep(0.2)


def wait_for_end(cluster: Cluster, run: Path, job: str) -> dict[str, str]:
    wait(run, lambda: cluster.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"))
    facts = cluster.job(job)
    logs = "\n".join(path.read_text()[-1500:] for path in sorted((run / "logs").glob("*.log")))
    assert facts["JobState"] == "COMPLETED", f"{facts['JobState']}\n{logs}"
    return facts


def tell(what: str, since: float) -> None:
    print(f"{what}: {time.monotonic() - since:.0f} s")


@pytest.fixture(scope="module")
def undisturbed(cluster, folder):
    started = time.monotonic()
    facts = wait_for_end(cluster, folder / "whole", submit(cluster, folder, "whole"))
    tell("undisturbed", started)
    assert facts["NodeList"] == "n[1-2]" and facts["Restarts"] == "0"
    return folder / "whole"


def assert_same(run: Path, whole: Path) -> None:
    name = f"step-{STEPS:08d}"
    expected, found = (load_file(place / "checkpoints" / name / "weights-00001.safetensors") for place in (whole, run))
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    proof = prove(run, None, whole)
    assert proof.failures == [] and any("losses equal bit for bit" in fact for fact in proof.facts)


def test_both_nodes_train(undisturbed, cluster):
    assert steps_of(undisturbed) == STEPS
    text = next((undisturbed / "logs").glob("slurm-*.log")).read_text()
    assert "start 1, nodes n[1-2]" in text and "srun ended with 0" in text
    assert sorted(path.name for path in (undisturbed / "logs").glob("rank-*.log")) == ["rank-0.log", "rank-1.log"]


def test_a_requeued_job_goes_on_bit_for_bit(undisturbed, cluster, folder):
    run, started = folder / "requeued", time.monotonic()
    job = submit(cluster, folder, "requeued")
    wait(run, lambda: steps_of(run) >= AWAY_AFTER)
    cluster.told("scontrol", "requeue", job)
    tell("requeued", started)
    facts = wait_for_end(cluster, run, job)
    tell("ended", started)
    assert int(facts["Restarts"]) >= 1
    text = next((run / "logs").glob("slurm-*.log")).read_text()
    assert "start 2" in text
    assert_same(run, undisturbed)


def test_a_node_that_dies_costs_time_only(undisturbed, cluster, folder):
    run, started = folder / "crashed", time.monotonic()
    job = submit(cluster, folder, "crashed")
    wait(run, lambda: steps_of(run) >= AWAY_AFTER + 10)
    cluster.crash(2)
    tell("node n2 died", started)
    wait(run, lambda: cluster.job(job)["JobState"] != "RUNNING" and cluster.job(job)["Restarts"] != "0")
    tell("its loss was noticed", started)
    cluster.revive(2)
    facts = wait_for_end(cluster, run, job)
    tell("ended", started)
    assert int(facts["Restarts"]) >= 1
    assert_same(run, undisturbed)


def test_a_job_arrays_data_is_that_of_one_process(cluster, folder, tmp_path):
    environment = {**cluster.environment, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    sbatch = str(ROOT / "launch" / "slurm" / "prepare.sbatch")
    alone = [sys.executable, "-m"]
    steps = {
        "prepare": ["--source", "shapes", "--options", "train_images=40", "val_images=5", "test_images=5"],
        "pack": ["--samples", "", "--tokenizer", "asset://tiny_llama", "--visual-tokens", "4", "--pack-length", "512"],
    }  # fmt: skip
    for program, words in steps.items():
        outputs = {}
        for name in ("array", "one"):
            given = [str(tmp_path / f"prepare-{name}" / "train.jsonl") if word == "" else word for word in words]
            outputs[name] = tmp_path / f"{program}-{name}"
            given += ["--output", str(outputs[name])]
            if name == "one":
                subprocess.run(
                    [*alone, f"data_prep.{program}", *given],
                    cwd=tmp_path,
                    env=environment,
                    check=True,
                    capture_output=True,
                )
                continue
            parts = [sbatch, program, "--parts", "3", *given]
            job = subprocess.run(
                ["sbatch", "--parsable", "--array=1-3", *parts],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
            merge = ["sbatch", "--parsable", "--wait", f"--dependency=afterok:{job}", *parts]
            done = subprocess.run(merge, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
            told = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
            assert done.returncode == 0, told + done.stderr
        assert contents(outputs["array"]) == contents(outputs["one"]), program


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
