"""Who this process is among the ranks: what the launcher's environment says, or what srun's says in its place.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. srun tells the same by other names; `adopt_ranks` translates,
so that the rest of the program knows one language. The address of rank 0 is the first host of the step's node list; the port is MASTER_PORT
where that is set (launch/slurm/train_mmt.sbatch looks for a free one on that host), else the first that Slurm reserved for the step, else a
number that all tasks make from the ids of job and step. Whatever contradicts itself is refused: a rank that means something else than the others
would have them wait for ever.

Rank 0 listens on MASTER_ADDR and on no other address, and gloo's connections stay on the loopback where that is its address.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from vltrain.errors import InputError

INTERACTIVE_STEPS = 0xFFFFFFF0  # ids from here on are Slurm's own steps: the batch script, a shell that salloc opened
PORTS = range(15000, 32000)  # below the ports that Linux gives away by itself


@dataclass(frozen=True, kw_only=True)
class Place:
    """A process among the tasks of a step of srun."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    num_nodes: int


def adopt_ranks(environment: MutableMapping[str, str] = os.environ, num_gpus: int | None = None) -> None:
    """Writes RANK and what goes with it into `environment` where srun started this process; leaves everything else as it is.

    Args:
        num_gpus: that this process sees; None: counted.

    Raises:
        InputError: the environment contradicts itself, or a task has no GPU of its own on a node with some.
    """
    if not _started_by_srun(environment):
        num_tasks = environment.get("SLURM_NTASKS", "1")
        if "RANK" not in environment and num_tasks not in ("", "1") and "SLURM_PROCID" in environment:
            raise InputError(
                f"this process was started in a Slurm job of {num_tasks} tasks, but not by srun, and would train alone; "
                "start it with srun, or with SLURM_NTASKS=1 if alone is what you want"
            )
        return
    place = _read_place(environment)
    if "RANK" in environment:
        _require_agreement(environment, place)
        return
    if place.world_size == 1 and "MASTER_ADDR" not in environment:
        return  # alone, as without Slurm
    environment.setdefault("MASTER_ADDR", first_host(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")))
    environment.setdefault("MASTER_PORT", str(_port(environment)))
    environment.update(
        RANK=str(place.rank), WORLD_SIZE=str(place.world_size), LOCAL_WORLD_SIZE=str(place.local_size),
        LOCAL_RANK=str(_local_rank(environment, place, torch.cuda.device_count() if num_gpus is None else num_gpus)),
    )


def _started_by_srun(environment: MutableMapping[str, str]) -> bool:
    step = environment.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in environment and step.isdigit() and int(step) < INTERACTIVE_STEPS


def _read_place(environment: MutableMapping[str, str]) -> Place:
    def number(*names: str) -> int:
        for name in names:
            if environment.get(name, "").isdigit():
                return int(environment[name])
        found = {name: environment.get(name) for name in names}
        raise InputError(f"srun's environment: found {found}, expected a number in {' or '.join(names)}")

    world_size = number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    tasks = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or str(world_size))
    node = number("SLURM_NODEID")
    rank, local_rank = number("SLURM_PROCID"), number("SLURM_LOCALID")
    if sum(tasks) != world_size or node >= len(tasks) or rank >= world_size or local_rank >= tasks[node]:
        raise InputError(
            f"srun's environment contradicts itself: task {rank} of {world_size}, number {local_rank} on node {node}, tasks on the nodes {tasks}; "
            "variables of another job or step may have been exported into this one"
        )
    return Place(rank=rank, world_size=world_size, local_rank=local_rank, local_size=tasks[node], num_nodes=len(tasks))


def _require_agreement(environment: MutableMapping[str, str], place: Place) -> None:
    """RANK is set beside srun's variables: either the same is meant, or a launcher inside each task starts ranks of its own."""
    rank, world_size = environment["RANK"], environment.get("WORLD_SIZE", "")
    means_the_same = (rank, world_size) == (str(place.rank), str(place.world_size))
    launched_inside = world_size.isdigit() and int(world_size) > place.world_size and int(world_size) % place.world_size == 0
    if not (means_the_same or launched_inside):
        raise InputError(
            f"RANK={rank} and WORLD_SIZE={world_size or 'unset'}, but srun says that this is task {place.rank} of {place.world_size}; "
            "unset RANK and WORLD_SIZE in the job, or start the launcher that sets them once per node"
        )


def _local_rank(environment: MutableMapping[str, str], place: Place, num_gpus: int) -> int:
    """Which of the GPUs that this process sees is its own; without any just its number on the node."""
    if num_gpus == 0 or num_gpus >= place.local_size:
        return place.local_rank
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    if num_gpus == 1 and on_node.isdigit() and int(on_node) >= place.local_size:
        return 0  # Slurm bound one GPU to each task
    raise InputError(f"{place.local_size} tasks on this node, but this one sees {num_gpus} GPU(s); give each its own (--ntasks-per-node = --gpus-per-node)")


def tasks_per_node(text: str) -> list[int]:
    """Slurm's `2(x3),1` as [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise InputError(f"tasks per node: found '{text}', expected Slurm's notation, such as 2(x3),1")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def first_host(node_list: str) -> str:
    """The first host of Slurm's `rack[1-2]n[03-08,11],login1`: rack1n03."""
    head = re.match(r"(?:[^,\[\]]|\[[^\[\]]*\])+", node_list)
    if head is None:
        raise InputError(f"SLURM_STEP_NODELIST: found '{node_list}', expected the nodes of this step; set MASTER_ADDR to the address of rank 0")
    return re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", head[0])


def _port(environment: MutableMapping[str, str]) -> int:
    reserved = re.match(r"\d+", environment.get("SLURM_STEP_RESV_PORTS", ""))
    if reserved:
        return int(reserved[0])
    ids = [int(environment.get(name) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")]
    return PORTS[(ids[0] * 97 + ids[1] * 13 + ids[2]) % len(PORTS)]


def join_process_group(backend: str, timeout: datetime.timedelta) -> None:
    """Joins the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; without RANK makes one of this process alone.

    Raises:
        InputError: one of them is missing or no number, or rank 0 cannot listen there.
    """
    environment = os.environ
    if "RANK" not in environment:
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    numbers = {name: environment.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    if not all(number.isdigit() for number in numbers.values()) or not environment.get("MASTER_ADDR"):
        raise InputError(f"the launcher's environment: found {numbers}, MASTER_ADDR={environment.get('MASTER_ADDR')}; expected an address and numbers")
    rank, world_size, port = (int(number) for number in numbers.values())
    address = environment["MASTER_ADDR"]
    if _is_loopback(_resolve(address, port)[4][0]) and os.path.exists("/sys/class/net/lo"):
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun listens itself
        dist.init_process_group(backend, timeout=timeout)
        return
    if rank > 0:
        store = dist.TCPStore(address, port, world_size, False, timeout)
    else:
        local_size = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or world_size
        listener = bind_rendezvous(address, port, across_nodes=int(local_size) < world_size)
        port = listener.getsockname()[1]
        environment["MASTER_PORT"] = str(port)
        # The descriptor is torch's from here on. Nobody is waited for: joining the group does that.
        store = dist.TCPStore(address, port, world_size, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach())
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def bind_rendezvous(address: str, port: int, across_nodes: bool) -> socket.socket:
    """A listening socket for the ranks to meet at, on that address only. Port 0: any free one.

    Raises:
        InputError: the address is not of this machine or not reachable by the other nodes, or the port is taken.
    """
    family, kind, protocol, _, place = _resolve(address, port)
    if across_nodes and _is_loopback(place[0]):
        raise InputError(
            f"MASTER_ADDR: found '{address}', which is {place[0]} here, where no other node can reach it; set MASTER_ADDR to this machine's address in the network"
        )
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(place)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise InputError(
            f"{address}:{port}: the ranks cannot meet there ({error.strerror}); set MASTER_ADDR to rank 0's address and MASTER_PORT to a free port"
        ) from None
    return listener


def _resolve(address: str, port: int) -> tuple:
    """socket.getaddrinfo's first answer."""
    try:
        return socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InputError(f"MASTER_ADDR: found '{address}', which does not resolve ({error}); set it to an address of rank 0's machine") from None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
