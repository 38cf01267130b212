"""Who this process is among the ranks: what the launcher's environment says, or what srun's says in its place.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. srun and MPI's launchers
(`vltrain.distributed.mpi`) tell the same by other names; `adopt_ranks` translates, so that the rest of the program
knows one language. The address of rank 0 is the first host of the step's node list; the port is MASTER_PORT where that
is set (launch/slurm/train_mmt.sbatch looks for a free one on that host), else the first that Slurm reserved for the
step, else a number that all tasks make from the ids of job and step. Whatever contradicts itself is refused: a rank
that means something else than the others would have them wait for ever, and one that does not know of the others would
train alone beside them.

Rank 0 listens on MASTER_ADDR and on no other address, and gloo's connections stay on the loopback where that is its
address.
"""

from __future__ import annotations

import datetime
import ipaddress
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from vltrain.distributed.mpi import OF_UNKNOWN_SIZE, MpiPlace, is_number, meeting_point, read_mpi
from vltrain.errors import InputError, RunLost

logger = logging.getLogger(__name__)

INTERACTIVE_STEPS = 0xFFFFFFF0  # ids from here on are Slurm's own steps: the batch script, a shell that salloc opened
LAUNCHER_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_PORT")
EITHER = "deepspeed or torchrun, which say it"
OF_LOST_RANKS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "gloo/transport/",
    "Broken pipe",
    "Timed out waiting",
    "NCCL error",
)
TELL_SECONDS = 60.0  # of waiting for other ranks, before a line about it
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
    """Writes RANK and what goes with it into `environment` where srun or MPI started this process; leaves everything
    else as it is.

    Args:
        num_gpus: that this process sees; None: counted.

    Raises:
        InputError: the environment contradicts itself or lacks what several ranks need, so that each would train alone
            or wait for ever; or a task has no GPU of its own on a node with some.
    """
    _require_sound(environment)
    place = _read_place(environment) if _started_by_srun(environment) else None
    mpi = read_mpi(environment)
    # srun sets PMI's variables too; and mpirun may have started its own processes, of which this is a child, by srun.
    if (
        mpi is not None
        and mpi.world_size > 1
        and (place is None or (mpi.rank, mpi.world_size) != (place.rank, place.world_size))
    ):
        _adopt_mpi(environment, mpi, num_gpus)
        return
    if place is None:
        _require_alone(environment)
        return
    if "RANK" in environment:
        _require_agreement(environment, f"srun says that this is task {place.rank}", place.rank, place.world_size)
        return
    if place.world_size == 1 and "MASTER_ADDR" not in environment:
        return  # alone, as without Slurm
    environment.setdefault(
        "MASTER_ADDR", first_host(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", ""))
    )
    environment.setdefault("MASTER_PORT", str(_port(environment)))
    environment.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_WORLD_SIZE=str(place.local_size),
        LOCAL_RANK=str(_local_rank(environment, place.local_rank, place.local_size, _count_gpus(num_gpus))),
    )


def _adopt_mpi(environment: MutableMapping[str, str], mpi: MpiPlace, num_gpus: int | None) -> None:
    if "RANK" in environment:
        _require_agreement(
            environment, f"{mpi.dialect.name} says that this is rank {mpi.rank}", mpi.rank, mpi.world_size
        )
        return
    address, port = meeting_point(mpi, environment)
    assert mpi.local_rank is not None and mpi.local_size is not None, "meeting_point asks for them"
    environment.update(
        RANK=str(mpi.rank),
        WORLD_SIZE=str(mpi.world_size),
        LOCAL_WORLD_SIZE=str(mpi.local_size),
        MASTER_ADDR=address,
        MASTER_PORT=port,
        LOCAL_RANK=str(_local_rank(environment, mpi.local_rank, mpi.local_size, _count_gpus(num_gpus))),
    )


def _require_sound(environment: Mapping[str, str]) -> None:
    """What torch's launchers set, where they set it: numbers that go together."""
    given = {name: environment[name] for name in LAUNCHER_NUMBERS if environment.get(name)}
    for name, value in given.items():
        if not is_number(value):
            raise InputError(
                f"{name}: found '{value}' in the environment, expected a number of the launcher's; unset it, or "
                "start with deepspeed or torchrun"
            )
    if "RANK" not in environment:
        return
    found = f"RANK={environment['RANK'] or 'empty'} and WORLD_SIZE={environment.get('WORLD_SIZE') or 'unset'}"
    if "RANK" not in given or "WORLD_SIZE" not in given or int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        raise InputError(
            f"found {found} in the environment, expected a rank below the number of ranks; unset both, or start "
            "with deepspeed or torchrun"
        )
    world_size, local_size = int(given["WORLD_SIZE"]), given.get("LOCAL_WORLD_SIZE") or given.get("LOCAL_SIZE")
    most = world_size if local_size is None else int(local_size)
    if (
        not 1 <= most <= world_size
        or int(given.get("LOCAL_RANK", "0")) >= most
        or int(given.get("LOCAL_RANK", "0")) > int(given["RANK"])
    ):
        variables = ", ".join(f"{name}={value}" for name, value in given.items())
        raise InputError(
            f"found {variables} in the environment, expected a LOCAL_RANK below the number of ranks of this machine, "
            "and those among WORLD_SIZE"
        )
    if world_size > 1 and not (environment.get("MASTER_ADDR") and "MASTER_PORT" in given):
        place = (
            f"MASTER_ADDR={environment.get('MASTER_ADDR') or 'unset'} and "
            f"MASTER_PORT={environment.get('MASTER_PORT') or 'unset'}"
        )
        raise InputError(
            f"found {found}, but {place} in the environment; set them to rank 0's address and a free port "
            "there, the same for all ranks"
        )


def _require_alone(environment: Mapping[str, str]) -> None:
    """Refuses a process that is one of several and would train alone, as each of them would."""
    if "RANK" in environment:
        return
    num_tasks = environment.get("SLURM_NTASKS", "1")
    if num_tasks not in ("", "1") and "SLURM_PROCID" in environment:
        raise InputError(
            f"this process was started in a Slurm job of {num_tasks} tasks, but not by srun, and would train alone; "
            "start it with srun, or with SLURM_NTASKS=1 if alone is what you want"
        )
    mpi = read_mpi(environment)
    for name, launcher in OF_UNKNOWN_SIZE.items():
        if name in environment and mpi is None:
            raise InputError(
                f"{launcher} started this process ({name}={environment[name]}), but does not say among how "
                f"many; start it with {EITHER}"
            )
    if environment.get("WORLD_SIZE") not in (None, "", "1") or environment.get("LOCAL_RANK"):
        found = ", ".join(
            f"{name}={environment[name]}" for name in ("WORLD_SIZE", "LOCAL_RANK") if environment.get(name)
        )
        raise InputError(
            f"found {found}, but no RANK in the environment: this process would train alone; unset them, or "
            f"start it with {EITHER}"
        )


def _count_gpus(num_gpus: int | None) -> int:
    return torch.cuda.device_count() if num_gpus is None else num_gpus


def _started_by_srun(environment: MutableMapping[str, str]) -> bool:
    step = environment.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in environment and step.isdigit() and int(step) < INTERACTIVE_STEPS


def _read_place(environment: MutableMapping[str, str]) -> Place:
    def number(*names: str) -> int:
        for name in names:
            if is_number(environment.get(name, "")):
                return int(environment[name])
        found = {name: environment.get(name) for name in names}
        raise InputError(f"srun's environment: found {found}, expected a number in {' or '.join(names)}")

    world_size = number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    tasks = tasks_per_node(
        environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or str(world_size)
    )
    node = number("SLURM_NODEID")
    rank, local_rank = number("SLURM_PROCID"), number("SLURM_LOCALID")
    if sum(tasks) != world_size or node >= len(tasks) or rank >= world_size or local_rank >= tasks[node]:
        raise InputError(
            f"srun's environment contradicts itself: task {rank} of {world_size}, number {local_rank} on node "
            f"{node}, tasks on the nodes {tasks}; "
            "variables of another job or step may have been exported into this one"
        )
    return Place(rank=rank, world_size=world_size, local_rank=local_rank, local_size=tasks[node], num_nodes=len(tasks))


def _require_agreement(environment: Mapping[str, str], source: str, own_rank: int, own_size: int) -> None:
    """RANK is set beside another launcher's variables: either the same is meant, or a launcher inside each task starts
    ranks of its own."""
    rank, world_size = environment["RANK"], environment["WORLD_SIZE"]
    means_the_same = (int(rank), int(world_size)) == (own_rank, own_size)
    launched_inside = int(world_size) > own_size and int(world_size) % own_size == 0
    if not (means_the_same or launched_inside):
        raise InputError(
            f"RANK={rank} and WORLD_SIZE={world_size}, but {source} of {own_size}; "
            "unset RANK and WORLD_SIZE in the job, or start the launcher that sets them once per node"
        )


def _local_rank(environment: Mapping[str, str], local_rank: int, local_size: int, num_gpus: int) -> int:
    """Which of the GPUs that this process sees is its own; without any just its number on the node."""
    if num_gpus == 0 or num_gpus >= local_size:
        return local_rank
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    if num_gpus == 1 and is_number(on_node) and int(on_node) >= local_size:
        return 0  # Slurm bound one GPU to each task
    raise InputError(
        f"{local_size} tasks on this node, but this one sees {num_gpus} GPU(s); give each its own "
        "(--ntasks-per-node = --gpus-per-node)"
    )


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
        raise InputError(
            f"SLURM_STEP_NODELIST: found '{node_list}', expected the nodes of this step; set MASTER_ADDR to the "
            "address of rank 0"
        )
    return re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", head[0])


def _port(environment: MutableMapping[str, str]) -> int:
    reserved = re.match(r"\d+", environment.get("SLURM_STEP_RESV_PORTS", ""))
    if reserved:
        return int(reserved[0])
    ids = [int(environment.get(name) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")]
    return PORTS[(ids[0] * 97 + ids[1] * 13 + ids[2]) % len(PORTS)]


def join_process_group(backend: str, timeout: datetime.timedelta) -> None:
    """Joins the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; without RANK makes one of
    this process alone.

    Raises:
        InputError: one of them is missing or no number, or rank 0 cannot listen there.
        RunLost: the ranks have not met within `timeout`.
    """
    environment = os.environ
    if "RANK" not in environment:
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    numbers = {name: environment.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    if not all(is_number(number) for number in numbers.values()) or not environment.get("MASTER_ADDR"):
        raise InputError(
            f"the launcher's environment: found {numbers}, MASTER_ADDR={environment.get('MASTER_ADDR')}; "
            "expected an address and numbers"
        )
    rank, world_size, port = (int(number) for number in numbers.values())
    address = environment["MASTER_ADDR"]
    if _is_loopback(_resolve(address, port)[4][0]) and os.path.exists("/sys/class/net/lo"):
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with _waiting_for_ranks(rank, world_size, f"{address}:{port}", timeout):
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
            store = dist.TCPStore(
                address, port, world_size, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
            )
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


@contextmanager
def _waiting_for_ranks(rank: int, world_size: int, place: str, timeout: datetime.timedelta) -> Iterator[None]:
    """Tells if it takes long inside the block, and names the ranks' meeting point where they have not come to it."""
    tell = threading.Timer(
        TELL_SECONDS,
        logger.warning,
        ["waiting at %s for %d ranks to meet, for %d minutes at most", place, world_size, timeout.seconds // 60],
    )
    tell.daemon = True
    tell.start()
    try:
        yield
    except dist.DistError as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0].strip()
        raise RunLost(
            f"rank {rank}: the {world_size} ranks have not met at {place} ({detail}); see the logs of the "
            "others, and whether MASTER_ADDR and MASTER_PORT "
            "are the same for all and not blocked by a firewall"
        ) from None
    finally:
        tell.cancel()


@contextmanager
def names_lost_ranks() -> Iterator[None]:
    """Turns what a collective raises when another rank has gone into one line. Raises RunLost."""
    try:
        yield
    except RuntimeError as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0].strip()
        if not (isinstance(error, dist.DistError) or any(words in str(error) for words in OF_LOST_RANKS)):
            raise
        raise RunLost(
            f"another rank, its machine or the network to it has gone ({detail[:300]}); see the other ranks' "
            "logs, then resume with --resume auto"
        ) from error


def bind_rendezvous(address: str, port: int, across_nodes: bool) -> socket.socket:
    """A listening socket for the ranks to meet at, on that address only. Port 0: any free one.

    Raises:
        InputError: the address is not of this machine or not reachable by the other nodes, or the port is taken.
    """
    family, kind, protocol, _, place = _resolve(address, port)
    if across_nodes and _is_loopback(place[0]):
        raise InputError(
            f"MASTER_ADDR: found '{address}', which is {place[0]} here, where no other node can reach it; set "
            "MASTER_ADDR to this machine's address in the network"
        )
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(place)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise InputError(
            f"{address}:{port}: the ranks cannot meet there ({error.strerror}); set MASTER_ADDR to rank 0's "
            "address and MASTER_PORT to a free port"
        ) from None
    return listener


def _resolve(address: str, port: int) -> tuple:
    """socket.getaddrinfo's first answer."""
    try:
        return socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InputError(
            f"MASTER_ADDR: found '{address}', which does not resolve ({error}); set it to an address of rank "
            "0's machine"
        ) from None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
