"""What a run needs of its machine before it starts, each thing refused with one line and not met hours later as a hang
or a traceback.

require_machine()    before anything is built: a driver that works, a GPU for this rank, room in /dev/shm
require_one_model()  once the ranks have met: all on GPUs of one model
"""

from __future__ import annotations

import glob
import logging
import os
import shutil
from collections.abc import Mapping

import torch
import torch.distributed as dist

from vltrain.errors import InputError

logger = logging.getLogger(__name__)

SHARED_MEMORY = "/dev/shm"
# Of each rank on this machine: NCCL's buffers take some 10 MB, the packs that a worker has ready a few MB.
LEAST_SHARED_BYTES = 16 * 2**20
MIXED_GPUS = "VLTRAIN_MIXED_GPUS"


def require_machine(workers: int, environment: Mapping[str, str] = os.environ) -> None:
    """Looks at driver, GPU and shared memory of this rank.

    Args:
        workers: processes of this rank that decode images.

    Raises:
        InputError: torch's CUDA build meets a GPU without a working driver, there are fewer GPUs than ranks, or
            /dev/shm is full.
    """
    require_driver(environment)
    require_own_gpu(environment)
    local_size = local_world_size(environment)
    if workers > 0 or local_size > 1:
        require_shared_memory(local_size * LEAST_SHARED_BYTES, SHARED_MEMORY)


def local_world_size(environment: Mapping[str, str] = os.environ) -> int:
    """How many ranks are on this machine."""
    return int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or 1)


def cpu_is_asked_for(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the user wants no GPU, whatever is here."""
    return environment.get("DS_ACCELERATOR") == "cpu" or environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


def signs_of_gpu(environment: Mapping[str, str] = os.environ) -> str | None:
    """What says that there is an NVIDIA GPU on this machine, whether or not torch can use it; None: nothing does."""
    devices = sorted(glob.glob("/dev/nvidia[0-9]*"))
    if devices:
        return f"{devices[0]} exists"
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if (
        visible not in ("", "-1") and "LOCAL_SIZE" not in environment
    ):  # DeepSpeed's launcher, which sets that, numbers CPU ranks by this one too
        return f"CUDA_VISIBLE_DEVICES is '{visible}'"
    command = shutil.which("nvidia-smi")
    return f"{command} is installed" if command else None


def driver_error() -> str:
    """Why torch's CUDA build cannot use a GPU here, in its own words."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).split(". ")[0].splitlines()[0]
    return "torch finds no GPU that it may use"


def require_driver(environment: Mapping[str, str] = os.environ) -> None:
    """Refuses a GPU whose driver does not work, on which the run would be a slow one on the CPU. Says so where a CUDA
    build meets no GPU at all."""
    if torch.cuda.is_available() or cpu_is_asked_for(environment):
        return
    signs = signs_of_gpu(environment)
    if torch.version.cuda is None:
        if signs is not None:
            logger.warning(
                "torch %s is a build without CUDA, so that this runs on the CPU, although %s", torch.__version__, signs
            )
        return
    if signs is not None:
        raise InputError(
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, but finds no working driver "
            f"({driver_error()}), although {signs}; repair or update the driver (nvidia-smi must list the GPUs), or "
            "set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    logger.info(
        "torch %s is built for CUDA, but there is no driver and no sign of a GPU: this runs on the CPU",
        torch.__version__,
    )


def require_own_gpu(environment: Mapping[str, str] = os.environ) -> None:
    """Refuses a rank that has no GPU of its own where there are GPUs."""
    number, count = (
        int(environment.get("LOCAL_RANK", "0")),
        torch.cuda.device_count() if torch.cuda.is_available() else 0,
    )
    if count and number >= count:
        raise InputError(
            f"rank {environment.get('RANK', '0')} is number {number} on its machine, counted from 0, but sees "
            f"{count} GPU(s); start {count} rank(s) "
            f"there (deepspeed --num_gpus {count}, torchrun --nproc_per_node {count}, srun --ntasks-per-node "
            f"{count}), or let it see more "
            f"(CUDA_VISIBLE_DEVICES is {environment.get('CUDA_VISIBLE_DEVICES', 'unset')})"
        )


def require_shared_memory(num_bytes: int, folder: str) -> None:
    """Refuses a `folder` of shared memory with less than `num_bytes` free; a system without one passes."""
    if not os.path.isdir(folder):
        return
    usage = shutil.disk_usage(folder)
    if usage.free < num_bytes:
        raise InputError(
            f"{folder}: found {usage.free / 2**20:.1f} of {usage.total / 2**20:.1f} MiB free, expected "
            f"{num_bytes / 2**20:.0f} MiB, for NCCL and the "
            "processes that decode images; remove what ended runs left there, give a container more (docker run "
            "--shm-size 8g), or train "
            "on one rank with --data.workers 0"
        )


def require_one_model(environment: Mapping[str, str] = os.environ) -> None:
    """Refuses ranks on GPUs of several models, where the slowest sets the pace and precision and kernels are chosen
    rank by rank.

    A collective in the process group's store, so that it works before NCCL does and whatever backend a rank has. With
    VLTRAIN_MIXED_GPUS=1 in the environment GPUs of several models may train together; a rank without any among ranks
    with one may not.

    Raises: InputError, on every rank.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    store.set(f"vltrain/gpu/{rank}", torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
    names = [name.decode() for name in store.multi_get([f"vltrain/gpu/{other}" for other in range(world_size)])]
    models = sorted(set(names))
    if len(models) == 1 or (environment.get(MIXED_GPUS) == "1" and "no GPU" not in models):
        return
    ranks = {model: [other for other, name in enumerate(names) if name == model] for model in models}
    models = "; ".join(f"{model}: rank {_ranges(numbers)}" for model, numbers in ranks.items())
    raise InputError(
        f"the ranks are not on GPUs of one model ({models}); choose GPUs or nodes of one (CUDA_VISIBLE_DEVICES, "
        "deepspeed --include, sbatch --constraint)"
        + ("" if "no GPU" in models else f", or set {MIXED_GPUS}=1 on all ranks to train at the pace of the slowest")
    )


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as 0-2,5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
