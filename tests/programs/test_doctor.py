"""`vltrain doctor`: really run here, with one rank and two, on machines that fakes describe, and with packages that
break in every way."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from tests.support.processes import ROOT, start_ranks, wait_for_ranks
from vltrain.doctor import gpus, host, kernels, ranks, software
from vltrain.doctor.findings import ABSENT, OK, PROBLEM, WARNING, Examination, Finding, merge, to_json, to_text
from vltrain.doctor.isolated import examine_kernels
from vltrain.programs import doctor

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
KERNELS = [case.what for case in kernels.CASES.values()]
LINES = {
    "Python",
    "torch and driver",
    "packages",
    "GPU",
    "CPU products",
    *KERNELS,
    "open files",
    "cores per rank",
    "shared memory",
    "compiler",
    "hub cache",
    "all-reduce (gloo)",
}


def check_report(report: dict, text: str, num_ranks: int) -> dict[str, str]:
    """The report as data and as lines say the same. Returns the status of each thing that all ranks found alike."""
    lines = [line for line in text.splitlines() if line.startswith((OK, ABSENT, WARNING, PROBLEM))]
    assert len(lines) == len(report["findings"]) and "Traceback" not in text
    for line, finding in zip(lines, report["findings"], strict=True):
        assert set(finding) == {"status", "what", "found", "needed", "do", "numbers", "ranks"}
        assert (
            line.startswith(finding["status"])
            and finding["what"] in line
            and finding["found"] in line
            and "{" not in line
        )
        assert set(finding["ranks"]) <= set(range(num_ranks)) and all(
            len(values) == len(finding["ranks"]) for values in finding["numbers"].values()
        )
    assert (report["ranks"], len(report["hosts"])) == (num_ranks, num_ranks)
    return {finding["what"]: finding["status"] for finding in report["findings"]}


@without_gpu
def test_one_rank_without_a_launcher(tmp_path):
    """`vltrain doctor FOLDER --json FILE`."""
    command = [
        sys.executable,
        "-m",
        "tests.support.rank",
        "tests.programs.doctor_worker",
        "",
        ",".join(kernels.CASES),
        str(tmp_path),
    ]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "report.json")], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    report = json.loads((tmp_path / "report.json").read_text())
    statuses = check_report(report, done.stdout + done.stderr, 1)
    assert set(statuses) == LINES | {f"folder {tmp_path}"}
    assert done.returncode == (report["status"] == PROBLEM), done.stdout
    for tried in (
        "Triton",
        "fused adapter kernel",
        "bitsandbytes, 4 bits",
        "bitsandbytes, 8 bits",
        "all-reduce (gloo)",
    ):
        assert statuses[tried] == OK, done.stdout
    assert statuses["GPU"] == statuses["torch varlen_attn"] == ABSENT
    speeds = next(finding["numbers"] for finding in report["findings"] if finding["what"].startswith("folder"))
    assert all(value > 0 for values in speeds.values() for value in values) and [
        path.name for path in tmp_path.iterdir()
    ] == ["report.json"]


@without_gpu
def test_two_ranks_and_a_package_that_breaks_on_one(tmp_path):
    """Rank 0 tells for both; what only one rank found names it; both end with the same code."""
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "sitecustomize.py").write_text(
        "import os, sys\nif os.environ.get('RANK') == '1':\n    sys.meta_path.insert(0, "
        "__import__('broken').Finder())\n"
    )
    (packages / "broken.py").write_text(
        "class Finder:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'triton.language':\n            raise OSError('libtriton.so: cannot open')\n"
    )
    folder = tmp_path / "new" / "folder"
    words = [str(packages), "triton,varlen", str(folder), "--json", str(tmp_path / "report.json")]
    processes = start_ranks("tests.programs.doctor_worker", words, 2, tmp_path / "log")
    assert wait_for_ranks(processes, tmp_path / "log", 180) == [1, 1], (tmp_path / "log.0").read_text()
    assert "problem" not in (tmp_path / "log.1").read_text()
    text, report = (tmp_path / "log.0").read_text(), json.loads((tmp_path / "report.json").read_text())
    assert set(check_report(report, text, 2)) == (LINES - set(KERNELS)) | {
        "Triton",
        "torch varlen_attn",
        f"folder {folder}",
    }
    findings = {(finding["what"], tuple(finding["ranks"])): finding for finding in report["findings"]}
    only = findings["Triton", (1,)]
    assert only["status"] == PROBLEM and "OSError: libtriton.so: cannot open" in only["found"]
    assert f"[rank 1 on {report['hosts'][1]}]" in next(line for line in text.splitlines() if "libtriton" in line)
    assert findings["Triton", (0,)]["status"] == OK and findings["torch varlen_attn", (0, 1)]["status"] == ABSENT
    reduced = findings["all-reduce (gloo)", (0, 1)]
    assert reduced["status"] == OK and all(value > 0 for value in reduced["numbers"]["gb_per_s"])
    assert findings["cores per rank", (0, 1)]["numbers"]["cores"] == [len(os.sched_getaffinity(0)) / 2] * 2
    assert not (tmp_path / "new").exists() and (f"folder {folder}", (0,)) in findings


def test_kernels_that_kill_hang_or_are_wrong_cost_a_line_each(tmp_path, monkeypatch):
    package = tmp_path / "bitsandbytes"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import os, signal\nprint('symbol lookup error', flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    (tmp_path / "liger_kernel").mkdir()
    (tmp_path / "liger_kernel" / "__init__.py").write_text("")
    (tmp_path / "liger_kernel" / "ops.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = examine_kernels(["flash3", "liger", "bits4"], threads=1, case_seconds=2.0)
    assert [finding.status for finding in found] == [ABSENT, PROBLEM, PROBLEM]
    assert [finding.what for finding in found] == ["flash-attn 3", "Liger", "bitsandbytes, 4 bits"]
    assert "did not end in time" in found[1].found
    assert "killed by SIGSEGV: symbol lookup error" in found[2].found


def test_a_wrong_result_is_a_problem(monkeypatch):
    inputs = [torch.randn(3, 4, requires_grad=True)]
    assert kernels.largest_error(lambda x: x.exp(), lambda x: x.exp(), inputs) < 1e-6
    right_value_wrong_gradient = kernels.largest_error(
        lambda x: x.detach().exp() + (x - x.detach()), lambda x: x.exp(), inputs
    )
    assert right_value_wrong_gradient > 0.1
    for error in (0.5, float("nan")):
        finding = kernels.examine(kernels.Case("it", lambda error=error: error, 1e-2, "speed"))
        assert finding.status == PROBLEM and finding.numbers.keys() == {"error"} and finding.do


@pytest.mark.parametrize("signature", ["window", "is_causal"])
def test_attention_is_asked_for_as_the_installed_function_takes_it(monkeypatch, signature):
    """Stand-ins with the signatures of torch's function before and after windows, and with flash-attn's; one that
    forgets causality is found out."""
    from vltrain.ops import reference

    def attend(query, key, value, starts, causal):
        lengths = starts.diff().cpu().long()
        if causal:
            return reference.packed_attention(*(one.transpose(0, 1)[None] for one in (query, key, value)), lengths)[
                0
            ].to(query.dtype)
        parts = (
            torch.softmax(q.transpose(0, 1) @ k.permute(1, 2, 0) / 8, -1) @ v.transpose(0, 1)
            for q, k, v in zip(*(one.split(lengths.tolist()) for one in (query, key, value)), strict=True)
        )
        return torch.cat([part.transpose(0, 1) for part in parts])

    def by_window(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
    ):
        assert cu_seq_q.dtype == torch.int32 and (max_q, max_k) == (64, 64)
        return attend(query, key, value, cu_seq_q, causal=window_size == (-1, 0))

    def by_flag(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None, scale=None):
        return attend(query, key, value, cu_seq_q, causal=is_causal)

    def flash(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        return attend(q, k, v, cu_seqlens_q, causal), torch.zeros(1)

    module = type(
        "module",
        (),
        {
            "varlen_attn": staticmethod(by_window if signature == "window" else by_flag),
            "flash_attn_varlen_func": staticmethod(flash),
        },
    )
    monkeypatch.setattr(kernels.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: module)
    monkeypatch.setattr(kernels.importlib.metadata, "version", lambda name: "2.8.3")
    monkeypatch.setattr(kernels, "_require_gpu", lambda capability: None)
    assert kernels._varlen() < kernels.ROUNDING
    assert kernels._flash("flash_attn", "flash-attn", (8, 0), "") < kernels.ROUNDING
    assert kernels._attention(lambda q, k, v, starts, longest: attend(q, k, v, starts, causal=False)) > 0.1


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU in torch's eyes; call it to change what it is."""

    def make(
        name="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        free=78,
        total=80,
        tflops=700.0,
        driver=13000,
        built="13.0",
        architectures=("sm_80", "sm_90"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free << 30, total << 30))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(architectures))
        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.setattr(software, "cuda_of_driver", lambda: driver)
        monkeypatch.setattr(gpus, "measured_gemm_flops", lambda dtype, size, place: tflops * 1e12)
        monkeypatch.setattr(software, "DRIVER_FILE", "/nonexistent")

    return make


@pytest.mark.parametrize(
    ("gpu", "status", "said"),
    [
        ({}, OK, "NVIDIA H100 80GB HBM3, compute capability 9.0, 78 of 80 GiB free, bf16 700 TFLOP/s (data sheet 989)"),
        ({"tflops": 200.0}, WARNING, "power limit or heat"),
        ({"free": 40}, WARNING, "other processes hold memory"),
        ({"free": 1}, PROBLEM, "too little to try it"),
        ({"name": "Tesla T4", "capability": (7, 5)}, WARNING, "train.precision fp32"),
        ({"name": "NVIDIA RTX A4000", "capability": (8, 6), "tflops": 60.0}, OK, "bf16 60 TFLOP/s"),  # an A40 it is not
    ],
)
def test_a_gpu(fake_gpu, gpu, status, said):
    fake_gpu(**gpu)
    finding = gpus.examine_gpu(0)
    assert finding.status == status and said in to_text(merge([[finding]]), ["here"])


@pytest.mark.parametrize(
    ("gpu", "status", "said"),
    [
        ({}, OK, "built for CUDA 13.0; driver knows CUDA 13.0"),
        ({"driver": 12080}, PROBLEM, "driver knows CUDA 12.8; needed: a driver for CUDA 13"),
        ({"driver": 12020, "built": "12.8"}, OK, "driver knows CUDA 12.2"),
        ({"capability": (7, 0)}, PROBLEM, "no code for GPU 0 (compute capability 7.0), only sm_80 sm_90"),
    ],
)
def test_torch_driver_and_gpu_fit(fake_gpu, monkeypatch, gpu, status, said):
    fake_gpu(**gpu)
    monkeypatch.setattr(software.shutil, "which", lambda name: None)  # no nvidia-smi
    finding = software.torch_and_driver()
    assert finding.status == status and said in to_text(merge([[finding]]), ["here"])


def test_a_cuda_build_without_a_driver_is_a_problem_only_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(software, "driver_error", lambda: "Found no NVIDIA driver on your system")
    monkeypatch.setattr(software, "cpu_is_asked_for", lambda: False)
    monkeypatch.setattr(software, "signs_of_gpu", lambda: "/dev/nvidia0 exists")
    finding = software.torch_and_driver()
    assert (
        finding.status == PROBLEM
        and "Found no NVIDIA driver" in finding.found
        and "/dev/nvidia0 exists" in finding.found
        and finding.do
    )
    monkeypatch.setattr(software, "signs_of_gpu", lambda: None)
    assert software.torch_and_driver().status == OK


@pytest.mark.parametrize(
    ("architectures", "runs"),
    [
        (["sm_90"], False),
        (["sm_80"], True),
        (["sm_86"], True),
        (["sm_89"], False),
        (["compute_75"], True),
        (["sm_90", "compute_90"], False),
        (["sm_100a"], False),
    ],
)
def test_what_runs_on_an_ampere(architectures, runs):
    assert software.runs_on((8, 6), architectures) == runs


def test_packages_out_of_bounds_or_missing(monkeypatch):
    versions = {"torch": "2.7.1+cu128", "deepspeed": "0.18.2", "bitsandbytes": "0.40.0", "setuptools": "65.5.0"}
    needed = [
        "torch<2.14,>=2.8",
        "deepspeed<0.20,>=0.18",
        "peft>=0.18",
        'bitsandbytes>=0.48; extra == "quant"',
        'trl>=1; extra == "bench"',
        'pywin32; sys_platform == "win32"',
    ]
    needed += ['setuptools>=77; extra == "flash"']  # for a build, which is not a run

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(software.importlib.metadata, "requires", lambda name: needed)
    monkeypatch.setattr(software.importlib.metadata, "version", version)
    *wrong, right = software.packages()
    assert {(finding.what, finding.found) for finding in wrong} == {
        ("package torch", "2.7.1+cu128"),
        ("package peft", "not installed"),
        ("package bitsandbytes", "0.40.0"),
    }
    assert all(finding.status == PROBLEM and "pip install" in finding.do for finding in wrong)
    assert right.status == OK and right.found.startswith("1 within")


def test_full_disks_and_folders_that_cannot_be_written(small_disk, tmp_path):
    assert host.shared_memory(1, str(small_disk)).status == PROBLEM
    assert host.shared_memory(1, str(tmp_path / "none")).status == ABSENT
    full = host.folder_speed(small_disk / "run", "output")
    assert full.status == PROBLEM and "0.2 MiB free" in full.found and list(small_disk.iterdir()) == []
    (tmp_path / "file").write_text("")
    refused = host.folder_speed(tmp_path / "file" / "run", "output")
    assert refused.status == PROBLEM and "Not a directory" in refused.found


def test_cores_are_shared_where_ranks_may_run_on_the_same():
    assert host.cores_per_rank([0, 1, 2, 3], [[0, 1, 2, 3]] * 2) == 2
    assert host.cores_per_rank([0, 1], [[0, 1], [2, 3]]) == 2  # bound, as srun does
    assert host.cores([0, 1], [[0, 1]] * 2, workers=1).status == WARNING


def test_the_compiler_is_tried(monkeypatch, tmp_path):
    assert host.compiler().status in (OK, ABSENT)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert host.compiler().status == ABSENT and "no-such-compiler" in host.compiler().found
    fake = tmp_path / "c++"
    fake.write_text("#!/bin/sh\necho 'fatal error: omp.h: No such file' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    assert host.compiler().status == WARNING and "omp.h: No such file" in host.compiler().found


def test_open_files_and_the_hub_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(host.resource, "getrlimit", lambda which: (1024, 524288))
    assert host.open_files().status == WARNING and host.open_files().do == "ulimit -n 4096"
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(host.os, "access", lambda place, mode: False)
    assert host.hub_cache().status == WARNING and "not writable" in host.hub_cache().found
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert host.hub_cache().status == OK and "offline (HF_HUB_OFFLINE)" in host.hub_cache().found


def test_ranks_on_several_models():
    facts = [ranks.Fact("a", (0,), "NVIDIA H100"), ranks.Fact("a", (1,), None), ranks.Fact("b", (0,), "NVIDIA H100")]
    (finding,) = ranks.one_model(facts)
    assert (
        finding.status == PROBLEM
        and "NVIDIA H100: ranks 0, 2" in finding.found
        and "no GPU of its own: ranks 1" in finding.found
    )
    assert ranks.one_model(facts[::2]) == []


def test_checks_that_raise_or_hang_are_lines():
    examination = Examination()
    examination.run("raises", lambda: 1 / 0)
    examination.run("hangs", lambda: time.sleep(3), timeout_seconds=0.05)
    examination.run("works", lambda: Finding(status=OK, what="works", found="fine"))
    assert [(one.what, one.status) for one in examination.findings] == [
        ("raises", PROBLEM),
        ("hangs", PROBLEM),
        ("works", OK),
    ]
    assert "ZeroDivisionError: division by zero" in examination.findings[0].found and examination.hung


def test_ranks_share_a_line_but_for_their_numbers():
    def gpu(tflops, status=OK):
        return Finding(status=status, what="GPU", found="H100, {tflops} TFLOP/s", numbers={"tflops": tflops})

    disk = Finding(status=OK, what="disk", found="fast", of_host=True)
    merged = merge([[gpu(700.0), disk], [gpu(712.4)], [gpu(300.0, WARNING), disk], [gpu(705.0)]])
    assert to_text(merged, ["a", "a", "b", "b"]).splitlines() == [
        "ok        GPU   H100, 700 to 712 TFLOP/s [a; rank 3 on b]",
        "warning   GPU   H100, 300 TFLOP/s [rank 2 on b]",
        "ok        disk  fast",
        "4 rank(s) on 2 host(s): 2 ok, 1 warning",
    ]
    data = to_json(merged, ["a", "a", "b", "b"])
    assert (
        data["status"] == WARNING
        and data["findings"][0]["numbers"] == {"tflops": [700.0, 712.4, 705.0]}
        and data["findings"][0]["ranks"] == [0, 1, 3]
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--jsn", "x"], "did you mean 'json'"),
        (["--json"], "found no value"),
        (["--json", "no/such/folder/x.json"], "a folder that exists"),
        (["--recipe", "no_such_recipe"], "no such file"),
    ],
)
def test_mistakes_on_the_command_line(capsys, words, said):
    assert doctor.main(words) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1


def test_help(capsys):
    assert doctor.main(["--help"]) == 0
    assert "--json" in capsys.readouterr().out
