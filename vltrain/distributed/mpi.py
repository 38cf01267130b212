"""What MPI's launchers, and others that know neither torch nor Slurm, tell a process about its place, each by names of
its own.

None of them tells where the ranks can meet: on one host that is the loopback, across hosts the user has to say it
(MASTER_ADDR, MASTER_PORT).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from vltrain.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """Names of a launcher's variables; of `local_rank` and `local_size` the first that is set counts. `passes`: how it
    hands variables to the ranks."""

    name: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    passes: str


DIALECTS = (
    Dialect(
        name="Open MPI",
        rank="OMPI_COMM_WORLD_RANK",
        size="OMPI_COMM_WORLD_SIZE",
        local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
        local_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
        passes="mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=PORT",
    ),
    Dialect(
        name="MVAPICH2",
        rank="MV2_COMM_WORLD_RANK",
        size="MV2_COMM_WORLD_SIZE",
        local_rank=("MV2_COMM_WORLD_LOCAL_RANK",),
        local_size=("MV2_COMM_WORLD_LOCAL_SIZE",),
        passes="mpirun_rsh ... MASTER_ADDR=HOST MASTER_PORT=PORT",
    ),
    Dialect(
        name="jsrun",
        rank="JSM_NAMESPACE_RANK",
        size="JSM_NAMESPACE_SIZE",
        local_rank=("JSM_NAMESPACE_LOCAL_RANK",),
        local_size=("JSM_NAMESPACE_LOCAL_SIZE",),
        passes="jsrun -E MASTER_ADDR=HOST -E MASTER_PORT=PORT",
    ),
    Dialect(
        name="Flux",
        rank="FLUX_TASK_RANK",
        size="FLUX_JOB_SIZE",
        local_rank=("FLUX_TASK_LOCAL_ID",),
        local_size=("FLUX_TASK_LOCAL_SIZE",),
        passes="flux run --env=MASTER_ADDR=HOST --env=MASTER_PORT=PORT",
    ),
    Dialect(  # last: others set PMI's beside their own
        name="MPICH or Intel MPI",
        rank="PMI_RANK",
        size="PMI_SIZE",
        local_rank=("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
        local_size=("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
        passes="mpiexec -genv MASTER_ADDR HOST -genv MASTER_PORT PORT",
    ),
)
OF_UNKNOWN_SIZE = {"PMIX_RANK": "a PMIx launcher", "ALPS_APP_PE": "aprun", "PALS_RANKID": "PALS"}
JOB_NAMES = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "PALS_APID", "JSM_JSRUN_ID", "FLUX_JOB_ID")
DEFAULT_PORT = 29500  # torch's


@dataclass(frozen=True, kw_only=True)
class MpiPlace:
    """A process among those that a launcher has started. `local_rank` and `local_size`: on its host; None where it is
    not told."""

    dialect: Dialect
    rank: int
    world_size: int
    local_rank: int | None
    local_size: int | None


def read_mpi(environment: Mapping[str, str]) -> MpiPlace | None:
    """The place that a launcher tells by names of its own; None without one. Raises InputError where it contradicts
    itself."""
    for dialect in DIALECTS:
        if dialect.rank not in environment and dialect.size not in environment:
            continue
        found = {
            name: environment[name]
            for name in (dialect.rank, dialect.size, *dialect.local_rank, *dialect.local_size)
            if name in environment
        }
        if (
            not all(is_number(value) for value in found.values())
            or dialect.rank not in found
            or dialect.size not in found
        ):
            raise InputError(
                f"{dialect.name}'s environment: found {found}, expected numbers in {dialect.rank} and {dialect.size}"
            )
        local_rank, local_size = (
            next((int(found[name]) for name in names if name in found), None)
            for names in (dialect.local_rank, dialect.local_size)
        )
        rank, world_size = int(found[dialect.rank]), int(found[dialect.size])
        within = local_rank is None or local_rank < (world_size if local_size is None else local_size)
        if rank >= world_size or not within or (local_size or 1) > world_size:
            raise InputError(
                f"{dialect.name}'s environment contradicts itself: {found}; variables of another job may have "
                "been exported into this one"
            )
        return MpiPlace(dialect=dialect, rank=rank, world_size=world_size, local_rank=local_rank, local_size=local_size)
    return None


def meeting_point(place: MpiPlace, environment: Mapping[str, str]) -> tuple[str, str]:
    """MASTER_ADDR and MASTER_PORT for the ranks. Raises InputError where the user has to say them."""
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if place.local_rank is None or place.local_size is None:
        wanted = " and ".join(" or ".join(names) for names in (place.dialect.local_rank, place.dialect.local_size))
        raise InputError(
            f"{place.dialect.name} started this process as rank {place.rank} of {place.world_size}, but does "
            "not say which it is on its host: expected "
            f"{wanted}; or set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT yourself"
        )
    if not address and place.local_size < place.world_size:
        raise InputError(
            f"{place.dialect.name} started this process as rank {place.rank} of {place.world_size}, "
            f"{place.local_size} of them on this host, but no rendezvous address is set; set MASTER_ADDR to rank "
            "0's host and MASTER_PORT to a free port there "
            f"({place.dialect.passes})"
        )
    job = next((environment[name] for name in JOB_NAMES if environment.get(name)), None)
    return address or "127.0.0.1", port or str(
        15000 + zlib.crc32(re.sub(r"\s", "", job).encode()) % 17000 if job else DEFAULT_PORT
    )


def is_number(text: str) -> bool:
    """Whether it is what launchers write: decimal digits, no sign."""
    return text.isascii() and text.isdecimal()
