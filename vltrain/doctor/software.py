"""Python, torch, the driver and the packages: do they fit each other?"""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import shutil
import subprocess
import sys

import torch
from packaging.requirements import Requirement

from vltrain.distributed.machine import cpu_is_asked_for, driver_error, signs_of_gpu
from vltrain.doctor.findings import ABSENT, OK, PROBLEM, WARNING, Finding

DRIVER_FILE = "/proc/driver/nvidia/version"
# what only flash-attn's build needs, such as setuptools, whose older versions do no harm otherwise
BUILD_EXTRA = 'extra == "flash"'


def python() -> Finding:
    """The interpreter against the metadata's bound."""
    found = platform.python_version()
    try:
        needed = importlib.metadata.metadata("vltrain")["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            status=WARNING,
            what="Python",
            found=f"{found}; vltrain is not installed",
            do="pip install -e . in the checkout",
        )
    fits = Requirement(f"python{needed}").specifier.contains(found, prereleases=True)
    return Finding(
        status=OK if fits else PROBLEM,
        what="Python",
        found=found,
        needed=needed,
        do="" if fits else "make an environment with a Python that fits",
    )


def torch_and_driver() -> Finding:
    """torch's build against the driver and the GPUs' architectures."""
    build = f"torch {torch.__version__}, " + (
        f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    )
    signs = signs_of_gpu()
    if torch.version.cuda is None:
        if signs is None or cpu_is_asked_for():
            return Finding(
                status=OK,
                what="torch and driver",
                found=f"{build}; no GPU here",
                needed="a CUDA build where there is a GPU",
            )
        return Finding(
            status=PROBLEM,
            what="torch and driver",
            found=f"{build}, but {signs}",
            needed="a CUDA build",
            do="install torch's CUDA build",
        )
    if not torch.cuda.is_available():
        if cpu_is_asked_for():
            return Finding(
                status=OK,
                what="torch and driver",
                found=f"{build}; the CPU is asked for (CUDA_VISIBLE_DEVICES or DS_ACCELERATOR)",
            )
        if signs is None:
            return Finding(
                status=OK,
                what="torch and driver",
                found=f"{build}; no driver and no sign of a GPU, so that runs take the CPU",
            )
        return Finding(
            status=PROBLEM,
            what="torch and driver",
            found=f"{build}, but the driver does not work ({driver_error()}), although {signs}",
            needed=f"a driver for CUDA {torch.version.cuda}",
            do="mend or update the driver, or install a torch built for an older CUDA",
        )
    return _driver_fit(build)


def _driver_fit(build: str) -> Finding:
    number = cuda_of_driver()
    driver = (number // 1000, number % 1000 // 10)
    built = tuple(map(int, str(torch.version.cuda).split(".")[:2]))
    found = f"{build}; driver{_driver_version()} knows CUDA {driver[0]}.{driver[1]}"
    if driver[0] < built[0]:
        return Finding(
            status=PROBLEM,
            what="torch and driver",
            found=found,
            needed=f"a driver for CUDA {built[0]}",
            do="update the driver, or install a torch built for an older CUDA",
        )
    architectures = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not runs_on(capability, architectures):
            return Finding(
                status=PROBLEM,
                what="torch and driver",
                needed="a torch built for this GPU",
                do="install another torch build",
                found=f"{found}; torch has no code for GPU {index} (compute capability "
                f"{capability[0]}.{capability[1]}), only {' '.join(architectures)}",
            )
    return Finding(status=OK, what="torch and driver", found=found, needed=f"a driver for CUDA {built[0]}")


def cuda_of_driver() -> int:
    """The newest CUDA that the driver knows, as it says itself: 13000 is 13.0. Raises OSError where its library cannot
    be loaded."""
    number = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    return number.value


def runs_on(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether code for `architectures` (`sm_90`, `compute_90`) runs: binaries within their major version, PTX from its
    version on."""
    for name in architectures:
        kind, _, digits = name.partition("_")
        digits = digits.rstrip("af")  # sm_90a: of exactly that chip
        version = (int(digits[:-1]), int(digits[-1]))
        same_major = version[0] == capability[0] and version <= capability
        if same_major or (kind == "compute" and version <= capability):
            return True
    return False


def _driver_version() -> str:
    """' 570.86' where the kernel's module or nvidia-smi says so, else nothing."""
    try:
        with open(DRIVER_FILE) as file:
            words = file.readline().split()
        return " " + next(word for word in words if word[0].isdigit() and "." in word)
    except (OSError, StopIteration):
        pass
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f" {done.stdout.split()[0]}" if done.returncode == 0 and done.stdout.split() else ""


def packages() -> list[Finding]:
    """Each package against the bounds in vltrain's metadata; those of extras only where they are installed, and those
    of flash-attn's build never."""
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("vltrain") or []]
    except importlib.metadata.PackageNotFoundError:
        return [
            Finding(
                status=WARNING,
                what="packages",
                found="vltrain is not installed, so that nothing says what it needs",
                do="pip install -e .",
            )
        ]
    checked: dict[str, str] = {}
    wrong: dict[tuple[str, str], Finding] = {}
    for one in requirements:
        optional = one.marker is not None and "extra" in str(one.marker)
        if one.marker is not None and not optional and not one.marker.evaluate():
            continue
        if optional and BUILD_EXTRA in str(one.marker):
            continue
        try:
            version = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            if not optional:
                wrong[one.name, ""] = _misfit(one, "not installed")
            continue
        checked[one.name] = version
        if not one.specifier.contains(version, prereleases=True):
            wrong[one.name, str(one.specifier)] = _misfit(one, version)
    heads = ", ".join(f"{name} {checked[name]}" for name in ("transformers", "deepspeed", "peft") if name in checked)
    fitting = len(checked) - len({name for name, _ in wrong if name in checked})
    return [
        *wrong.values(),
        Finding(status=OK, what="packages", found=f"{fitting} within the bounds of setup.cfg ({heads})"),
    ]


def _misfit(requirement: Requirement, found: str) -> Finding:
    needed = str(requirement.specifier) or "any version"
    words = f"{sys.executable} -m pip install '{requirement.name}{requirement.specifier}'"
    return Finding(status=PROBLEM, what=f"package {requirement.name}", found=found, needed=needed, do=words)


def what_a_gpu_changes() -> Finding:
    """Without a GPU: what would run differently with one, by what is installed here."""
    found = "products in bf16 (Ampere or newer), the fused adapter kernel, NCCL in place of gloo, torch's fused AdamW"
    found += (
        f"; Liger's kernels ({_installed('liger-kernel')}); attention by flash-attn ({_installed('flash-attn')}) or "
        "torch's varlen_attn in place of packed SDPA"
    )
    return Finding(status=ABSENT, what="GPU", found=f"none; one would change: {found}")


def _installed(name: str) -> str:
    try:
        return f"{importlib.metadata.version(name)} is installed"
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
