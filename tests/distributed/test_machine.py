"""What a machine lacks is refused before a run starts: one line that says what was found and what to do."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.support.processes import ROOT, start_ranks, wait_for_ranks
from vltrain.distributed import machine
from vltrain.errors import InputError
from vltrain.programs import evaluate, train
from vltrain.programs.checks import replay


@pytest.fixture
def cuda_build(monkeypatch):
    """torch's CUDA build on a machine where it finds no driver; call it with the signs of a GPU that there are."""

    def make(devices=(), command=None):
        def init():
            raise RuntimeError(
                "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"
            )

        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(machine.glob, "glob", lambda pattern: list(devices))
        monkeypatch.setattr(machine.shutil, "which", lambda name: command)

    return make


@pytest.mark.parametrize(
    ("signs", "environment", "sign"),
    [
        ({"devices": ["/dev/nvidia0", "/dev/nvidia1"]}, {}, "/dev/nvidia0 exists"),
        ({"command": "/usr/bin/nvidia-smi"}, {}, "/usr/bin/nvidia-smi is installed"),
        ({}, {"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES is '0,1'"),
    ],
)
def test_a_gpu_without_a_driver(cuda_build, signs, environment, sign):
    cuda_build(**signs)
    with pytest.raises(InputError) as refusal:
        machine.require_driver(environment)
    said = str(refusal.value)
    assert (
        sign in said
        and "built for CUDA 13.0" in said
        and "driver on your system is too old (found version 11040)" in said
    )
    assert "CUDA_VISIBLE_DEVICES= " in said and "\n" not in said
    machine.require_driver({"CUDA_VISIBLE_DEVICES": ""})
    machine.require_driver({**environment, "DS_ACCELERATOR": "cpu"})


def test_a_cuda_build_on_a_plain_cpu_machine_runs_and_says_so(cuda_build, caplog):
    cuda_build()
    caplog.set_level("INFO", logger="vltrain")  # whatever level a program has left there
    machine.require_driver({})
    machine.require_driver(
        {"CUDA_VISIBLE_DEVICES": "0,1", "LOCAL_SIZE": "2"}
    )  # which DeepSpeed's launcher sets for CPU ranks too
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"] and "runs on the CPU" in caplog.text


def test_a_cpu_build_beside_a_gpu_warns(monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    machine.require_driver({})
    assert "/dev/nvidia0 exists" in caplog.text


def test_fewer_gpus_than_ranks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    machine.require_own_gpu({"RANK": "5", "LOCAL_RANK": "1"})
    with pytest.raises(
        InputError,
        match=r"rank 6 is number 2 on its machine, counted from 0, but sees 2 GPU\(s\); start 2 rank.*--num_gpus 2",
    ):
        machine.require_own_gpu({"RANK": "6", "LOCAL_RANK": "2"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machine.require_own_gpu({"RANK": "6", "LOCAL_RANK": "2"})


def test_full_shared_memory(small_disk, monkeypatch):
    monkeypatch.setattr(machine, "SHARED_MEMORY", str(small_disk))
    with pytest.raises(InputError, match=r"found 0\.2 of 0\.2 MiB free, expected 32 MiB.*--shm-size.*--data.workers 0"):
        machine.require_machine(0, {"LOCAL_WORLD_SIZE": "2"})
    with pytest.raises(InputError, match="expected 16 MiB"):
        machine.require_machine(1, {})
    machine.require_machine(0, {})  # alone and without workers nothing needs it
    machine.require_shared_memory(1 << 60, str(small_disk / "none"))


def test_real_ranks_on_gpus_of_two_models(tmp_path):
    ranks = start_ranks("tests.distributed.one_model_worker", ["NVIDIA H100", "NVIDIA A100"], 2, tmp_path / "log")
    assert wait_for_ranks(ranks, tmp_path / "log", 300) == [2, 2]
    for rank in range(2):
        text = (tmp_path / f"log.{rank}").read_text()
        assert (
            "(NVIDIA A100: rank 1; NVIDIA H100: rank 0)" in text
            and "VLTRAIN_MIXED_GPUS=1" in text
            and "Traceback" not in text
        )


@pytest.mark.parametrize(
    ("names", "mixed", "refusal"),
    [
        (["NVIDIA H100"] * 3, "", None),
        (["no GPU"] * 3, "", None),
        (["NVIDIA H100", "NVIDIA A100", "NVIDIA H100"], "1", None),
        (["NVIDIA A100", "NVIDIA H100", "NVIDIA H100"], "0", "NVIDIA A100: rank 0; NVIDIA H100: rank 1-2"),
        (["no GPU", "NVIDIA H100", "NVIDIA H100"], "1", "no GPU: rank 0"),
    ],
)
def test_which_mixtures_are_refused(monkeypatch, names, mixed, refusal):
    """This process is rank 0 of three; the others have written their GPU's name into the store."""
    store = torch.distributed.HashStore()
    for rank in (1, 2):
        store.set(f"vltrain/gpu/{rank}", names[rank])
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: names[0] != "no GPU")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: names[0])
    if refusal is None:
        machine.require_one_model({"VLTRAIN_MIXED_GPUS": mixed})
        return
    with pytest.raises(InputError) as refused:
        machine.require_one_model({"VLTRAIN_MIXED_GPUS": mixed})
    assert refusal in str(refused.value) and ("VLTRAIN_MIXED_GPUS" in str(refused.value)) == ("no GPU" not in names)


def test_ranks_are_named_in_ranges():
    assert machine._ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


def test_every_program_that_trains_or_evaluates_asks_first(monkeypatch, tmp_path, capsys):
    """Each ends with the refusal before it makes or reads anything of the run."""

    def refuse(*arguments, **named):
        raise InputError("no driver")

    for program in (train, evaluate, replay):
        monkeypatch.setattr(program, "require_machine", refuse)
    assert train.main(["--output", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()
    run = tmp_path / "done"
    run.mkdir()
    (run / "config.yaml").write_text("{}\n")
    (run / "ds_config.json").write_text(json.dumps({}))
    assert evaluate.main([str(run)]) == 2
    with pytest.raises(InputError, match="no driver"):
        replay.replay(run, 0)
    assert capsys.readouterr().err.splitlines() == ["error: no driver"] * 2


def test_deepspeeds_accelerator_is_left_to_the_user():
    """After the import the variable is what the user made it: a child that finds `cpu` takes it for the user's wish."""
    code = (
        "import os, vltrain.train.zero.engine as e; print(e.deepspeed.get_accelerator().device_name(), "
        "os.environ.get('DS_ACCELERATOR'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=environment | given, stdout=subprocess.PIPE, text=True
        )
        for given in ({}, {"DS_ACCELERATOR": "cpu"})
    ]
    assert [child.communicate()[0].split()[-1] for child in children] == ["None", "cpu"]
