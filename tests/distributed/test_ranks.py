"""Ranks from srun's variables, and a rendezvous that listens where it was told and nowhere else."""

import socket
import subprocess
import sys

import psutil
import pytest

from tests.support.processes import ROOT, free_port, rank_environment, start
from vltrain.distributed.ranks import adopt_ranks, bind_rendezvous, first_host, names_lost_ranks, tasks_per_node
from vltrain.errors import InputError, RunLost

# Task 3 of `srun --nodes 2 --ntasks 5`, of which two run on the second node.
SRUN = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}

MEET = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4711"}


def adopted(num_gpus: int = 0, **changes: str | None) -> dict[str, str]:
    """What `adopt_ranks` adds to srun's variables."""
    given = {name: value for name, value in {**SRUN, **changes}.items() if value is not None}
    environment = dict(given)
    adopt_ranks(environment, num_gpus)
    return {name: value for name, value in environment.items() if given.get(name) != value}


def test_srun_says_who_is_who():
    found = adopted()
    port = int(found.pop("MASTER_PORT"))
    assert found == {"RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu07"}
    assert 15000 <= port < 32000
    ports = {step: adopted(SLURM_STEP_ID=step)["MASTER_PORT"] for step in "0123"}
    assert ports["0"] == str(port) and len(set(ports.values())) == 4
    assert adopted(SLURM_PROCID="0", SLURM_NODEID="0")["MASTER_PORT"] == str(port)


def test_what_the_user_sets_is_kept():
    found = adopted(MASTER_ADDR="10.0.0.7", MASTER_PORT="4711")
    assert "MASTER_ADDR" not in found and "MASTER_PORT" not in found and found["RANK"] == "3"
    assert adopted(SLURM_STEP_RESV_PORTS="12004-12005")["MASTER_PORT"] == "12004"


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_STEP_ID": None, "SLURM_PROCID": None},
        {"SLURM_STEP_ID": "4294967290", "SLURM_NTASKS": "1"},  # a shell of salloc
        {"SLURM_STEP_ID": None, "SLURM_NTASKS": "1"},  # a batch script
        {"RANK": "3", "WORLD_SIZE": "5", **MEET},
        {"RANK": "13", "WORLD_SIZE": "20", **MEET},  # a launcher in each task
        {"RANK": "0", "WORLD_SIZE": "1", "SLURM_STEP_ID": None},  # a launcher in the batch script
        {
            "SLURM_PROCID": "0",
            "SLURM_NODEID": "0",
            "SLURM_NTASKS": "1",
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_STEP_TASKS_PER_NODE": "1",
        },
    ],
)
def test_others_are_left_alone(changes):
    assert adopted(**changes) == {}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"SLURM_STEP_ID": None}, "a Slurm job of 5 tasks, but not by srun"),
        ({"SLURM_PROCID": "5"}, "task 5 of 5"),
        ({"SLURM_LOCALID": "2"}, "number 2 on node 1"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, "tasks on the nodes [2, 2]"),
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, "found 'two'"),
        ({"SLURM_LOCALID": None}, "expected a number in SLURM_LOCALID"),
        ({"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST: found ''"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK=0 and WORLD_SIZE=1, but srun says that this is task 3 of 5"),
        ({"RANK": "2", "WORLD_SIZE": "5", **MEET}, "task 3 of 5"),
        ({"RANK": "2"}, "WORLD_SIZE=unset"),
    ],
)
def test_contradictions_are_named(changes, named):
    with pytest.raises(InputError) as refused:
        adopted(**changes)
    assert named in str(refused.value)


def test_each_task_has_a_gpu_of_its_own():
    assert adopted(2, SLURM_PROCID="4", SLURM_LOCALID="1")["LOCAL_RANK"] == "1"
    assert adopted(1, SLURM_PROCID="4", SLURM_LOCALID="1", SLURM_GPUS_ON_NODE="2")["LOCAL_RANK"] == "0"
    with pytest.raises(InputError, match="2 tasks on this node, but this one sees 1 GPU"):
        adopted(1, SLURM_PROCID="4", SLURM_LOCALID="1", SLURM_GPUS_ON_NODE="1")


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[007,012-020],login1", "gpu007"),
        ("rack[1-2]n[03-08]", "rack1n03"),
        ("a1,a2", "a1"),
        ("n[5]-ib", "n5-ib"),
    ],
)
def test_first_host(node_list, host):
    assert first_host(node_list) == host


def test_tasks_per_node():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]


def test_it_listens_on_that_address_only():
    """A real process group of one process: every port that it opened is on the loopback."""
    program = """
import datetime, os, sys
from vltrain.distributed.ranks import join_process_group
join_process_group("gloo", datetime.timedelta(seconds=30))
print("joined", os.environ["MASTER_PORT"], flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        port = int(
            next(line for line in process.stdout if line.startswith("joined")).split()[1]
        )  # older torch says more before
        listening = [
            one.laddr for one in psutil.Process(process.pid).net_connections() if one.status == psutil.CONN_LISTEN
        ]
    finally:
        process.kill()
        process.communicate()
    assert port in {address.port for address in listening}
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_a_place_where_nobody_can_meet_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(InputError, match="Address already in use"):
            bind_rendezvous("127.0.0.1", other.getsockname()[1], across_nodes=False)
    with pytest.raises(InputError, match="no other node can reach it"):
        bind_rendezvous("localhost", free_port(), across_nodes=True)
    with pytest.raises(InputError, match="Cannot assign requested address"):
        bind_rendezvous("192.0.2.1", free_port(), across_nodes=True)
    with pytest.raises(InputError, match="does not resolve"):
        bind_rendezvous("no-such-host.invalid", 1, across_nodes=True)


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.7]:4711",
        "NCCL error: unhandled system error",
    ],
)
def test_a_lost_rank_is_one_line_and_no_mistake_of_the_input(text):
    with pytest.raises(RunLost, match="another rank, its machine or the network") as lost, names_lost_ranks():
        raise RuntimeError(text + "\nwhere it was raised")
    assert lost.value.exit_code == 1 and "\n" not in str(lost.value)


def test_other_errors_stay_as_they_are():
    with pytest.raises(RuntimeError, match="shapes"), names_lost_ranks():
        raise RuntimeError("shapes differ")


MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def test_mpi_across_hosts_meets_where_the_user_says():
    environment = {**MPI, **MEET}
    adopt_ranks(environment, 0)
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert {name: environment[name] for name in expected} == expected
    assert {name: environment[name] for name in MEET} == MEET


@pytest.mark.parametrize(
    "names",
    [
        ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"),
    ],
)
def test_every_dialect_on_one_host(names):
    environment = dict(zip(names, ("1", "2", "1", "2"), strict=True))
    adopt_ranks(environment, 2)
    found = [environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")]
    assert found == ["1", "2", "1", "2", "127.0.0.1"]


def test_mpi_of_one_rank_is_alone():
    environment = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    adopt_ranks(environment, 0)
    assert "RANK" not in environment


def test_srun_says_it_where_it_sets_pmis_variables_too():
    assert adopted(PMI_RANK="3", PMI_SIZE="5", PMIX_RANK="3")["LOCAL_WORLD_SIZE"] == "2"


@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize(
    ("ending", "code"), [("return 3", 3), ("raise SystemExit(85)", 85), ("raise AssertionError('ours')", 1)]
)
def test_a_program_ends_before_the_interpreter_is_torn_down(tmp_path, joins, ending, code):
    """Threads of gloo's that are still at work then would abort a rank: exit code 134, see `vltrain.cli.leave`."""
    script = tmp_path / "rank.py"
    script.write_text(f"""
import atexit, datetime, threading, time
from vltrain.cli import leave
from vltrain.distributed.ranks import join_process_group

class TornDown:
    def __del__(self):
        print("torn down", flush=True)

def program():
    if {joins}:
        join_process_group("gloo", datetime.timedelta(seconds=60))
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    {ending}

kept = TornDown()
atexit.register(print, "atexit")
leave(program)
""")
    out, err = tmp_path / "out", tmp_path / "err"
    environment = {name: value for name, value in rank_environment(0, 1, 0).items() if name != "RANK"}
    assert start(str(script), [], environment, out, err).wait(120) == code, err.read_text()
    assert out.read_text() == "thread\natexit\n"
    assert ("AssertionError: ours" in err.read_text()) == (code == 1)
