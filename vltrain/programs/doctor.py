"""`vltrain doctor` and launch/doctor.py: can this machine train, and with what? Each thing is tried and reported
on one line.

    vltrain doctor [FOLDER ...] [--recipe RECIPE] [--json FILE|-]
        one process, which looks at all GPUs that it sees; --ranks N: as many
    deepspeed launch/doctor.py ..., srun python launch/doctor.py ...
        every rank looks at its own; a line names its ranks unless it is all

examples:
    vltrain doctor
    vltrain doctor /data /scratch/runs --recipe llama2_7b_diht_scienceqa --json -

Takes less than a minute. FOLDERs are tried for speed; without any the recipe's data.root and output (left out: the
quickstart's). --json writes the same as data to a file, or with - prints it in place of the lines. Exit code 0; 1 where
there is a problem; 2 for a mistake on the command line. Needs no GPU: without one it says what one would change.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from vltrain.config.command_line import COMMAND_LINE, split_arguments
from vltrain.config.schema import Config
from vltrain.config.stages import load_stages
from vltrain.distributed.machine import local_world_size, require_own_gpu
from vltrain.distributed.ranks import adopt_ranks
from vltrain.doctor import gpus, host, ranks, software
from vltrain.doctor.findings import PROBLEM, Examination, Finding, merge, one_line, to_json, to_text
from vltrain.doctor.isolated import examine_kernels
from vltrain.doctor.kernels import CASES
from vltrain.errors import InputError, exits_cleanly

KERNELS_TIMEOUT = 300.0  # each has its own, much shorter; this one bounds their sum


@exits_cleanly
def main(argv: list[str], *, program: str = "vltrain doctor") -> int:
    """Examines this rank and reports. Returns the exit code, the same on all ranks: see the module."""
    arguments = split_arguments(argv)
    if ("help", None) in arguments.options:
        print((__doc__ or "").strip())
        return 0
    arguments.require_known(("json", "recipe"))
    report = arguments.last("json")
    if report not in (None, "-") and not Path(report).absolute().parent.is_dir():
        raise InputError(f"{COMMAND_LINE}: --json: found '{report}', expected a file in a folder that exists, or -")
    config = _config(arguments.last("recipe"))
    folders = [(Path(name), "given") for name in arguments.positionals] or [
        (Path(config.data.root), "data"),
        (Path(config.output), "output"),
    ]

    examination = Examination()
    code = _examine_and_report(examination, folders, config.data.workers, report)
    if examination.hung:  # a thread in a library's call would keep the interpreter from ending
        sys.stdout.flush()
        os._exit(code)
    return code


def _config(recipe: str | None) -> Config:
    if recipe is None:
        return Config()
    return load_stages(["--recipe", recipe], options={}, program="vltrain doctor").parts[0].config


def _examine_and_report(
    examination: Examination, folders: list[tuple[Path, str]], workers: int, report: str | None
) -> int:
    names: list[str] = []
    joined: list[tuple[int, list[ranks.Fact]]] = []

    def own_gpu() -> list[Finding]:
        adopt_ranks()
        require_own_gpu()
        names.extend([torch.cuda.get_device_name(_local_rank())] if torch.cuda.is_available() else [])
        return []

    def meet() -> list[Finding]:
        own_rank, _ = ranks.join()
        joined.append((own_rank, ranks.gather(facts[0])))
        return []

    examination.run("GPU", own_gpu)
    index = _local_rank() if names else None
    facts, rank = [ranks.own_fact(names[0] if names else None)], 0
    examination.run("ranks", meet, ranks.GROUP_TIMEOUT.total_seconds() + 10)
    if joined:
        rank, facts = joined[0]
    local = [other for other, fact in enumerate(facts) if fact.host == facts[rank].host]
    _examine_software_and_devices(
        examination, index, len(facts) == 1, [facts[other].cores for other in local], facts[rank].cores
    )
    _examine_host(
        examination, facts[rank], [facts[other] for other in local], folders if rank == local[0] else None, workers
    )
    if joined:
        _examine_group(examination, facts, index)
        code = _report_together(examination, rank, facts, report)
        if not examination.hung:
            ranks.leave()
        return code
    return _report(merge([examination.findings]), [facts[0].host], report)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _examine_software_and_devices(
    examination: Examination,
    index: int | None,
    alone: bool,
    cores_of_local_ranks: list[tuple[int, ...]],
    own_cores: tuple[int, ...],
) -> None:
    examination.run("Python", software.python)
    examination.run("torch and driver", software.torch_and_driver)
    examination.run("packages", software.packages)
    threads = max(1, int(host.cores_per_rank(own_cores, cores_of_local_ranks)))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    if index is None:
        if not torch.cuda.is_available():
            examination.run("GPU", software.what_a_gpu_changes)
        examination.run("CPU products", gpus.examine_cpu)
    elif alone:
        for number in range(torch.cuda.device_count()):
            examination.run(f"GPU {number}", partial(gpus.examine_gpu, number, f"GPU {number}"))
    else:
        examination.run("GPU", partial(gpus.examine_gpu, index))
    if index is not None or not torch.cuda.is_available():
        examination.run("kernels", partial(examine_kernels, tuple(CASES), threads), KERNELS_TIMEOUT)


def _examine_host(
    examination: Examination,
    own: ranks.Fact,
    local: list[ranks.Fact],
    folders: list[tuple[Path, str]] | None,
    workers: int,
) -> None:
    """`folders`: None on all but the first rank of a machine, which looks at what the ranks share."""
    examination.run("open files", host.open_files)
    examination.run("cores per rank", partial(host.cores, own.cores, [fact.cores for fact in local], workers))
    if folders is None:
        return
    num_before = len(examination.findings)
    examination.run("shared memory", partial(host.shared_memory, max(len(local), local_world_size())))
    for folder, purpose in folders:
        examination.run(f"folder {folder}", partial(host.folder_speed, folder, purpose))
    examination.run("compiler", host.compiler)
    examination.run("hub cache", host.hub_cache)
    examination.findings[num_before:] = [replace(one, of_host=True) for one in examination.findings[num_before:]]


def _examine_group(examination: Examination, facts: list[ranks.Fact], index: int | None) -> None:
    examination.run("GPU models", partial(ranks.one_model, facts))
    examination.run("all-reduce (gloo)", partial(ranks.all_reduce, "gloo"))
    if all(fact.gpu is not None for fact in facts):
        examination.run(
            "all-reduce (nccl)", partial(ranks.all_reduce, "nccl", index), 2 * ranks.NCCL_TIMEOUT.total_seconds()
        )


def _report_together(examination: Examination, rank: int, facts: list[ranks.Fact], report: str | None) -> int:
    """Rank 0 tells what all found; where the ranks cannot be heard, each tells its own."""
    try:
        everything = ranks.gather(examination.findings)
        merged = merge(everything)
        if rank == 0:
            code = _report(merged, [fact.host for fact in facts], report)
        else:
            code = int(any(entry.finding.status == PROBLEM for entry in merged))
        ranks.gather(
            None
        )  # a launcher ends all ranks as soon as one ends with 1, so nobody goes before rank 0 has told
        return code
    except RuntimeError as error:
        lost = Finding(
            status=PROBLEM,
            what="ranks",
            found=f"the findings of the others did not arrive ({one_line(error)}); these are rank {rank}'s",
        )
        return _report(merge([[*examination.findings, lost]]), [facts[rank].host], report if rank == 0 else None)


def _report(merged: list, hosts: list[str], report: str | None) -> int:
    data = to_json(merged, hosts)
    if report == "-":
        print(json.dumps(data, indent=1), flush=True)
    else:
        print(to_text(merged, hosts), flush=True)
    if report not in (None, "-"):
        try:
            Path(report).write_text(json.dumps(data, indent=1) + "\n")
        except OSError as error:
            raise InputError(f"{COMMAND_LINE}: --json: '{report}' cannot be written ({error.strerror})") from None
    return int(data["status"] == PROBLEM)
