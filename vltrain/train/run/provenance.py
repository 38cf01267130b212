"""What a run was made of: the resolved config, the code's commit, package versions, the machine. Written before step
1."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from vltrain.config.recipe import RECIPE, RUN
from vltrain.config.strict_yaml import load_text
from vltrain.errors import InputError
from vltrain.files.atomic import write_json, write_whole

PACKAGES = (
    "vltrain",
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "flash-attn",
    "liger-kernel",
    "bitsandbytes",
    "numpy",
    "pyarrow",
    "sentencepiece",
    "pillow",
)
GIT_SECONDS = 30.0


def code_commit() -> str:
    """The git commit of this source tree, with `+changes` if it differs from it; that of which it was frozen; else
    `unknown`."""
    root = Path(__file__).resolve().parents[3]
    frozen = root / "COMMIT"  # of launch/submit.py
    if frozen.is_file():
        return frozen.read_text().strip()

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=GIT_SECONDS
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on; absent ones are left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write_provenance(
    folder: Path,
    *,
    resolved_config: str,
    ds_config: dict[str, Any],
    world_size: int,
    parameters: dict[str, tuple[int, int]],
    identity: dict[str, Any],
    tokenizer: str,
    data: dict[str, Any],
    full_qformer: int | None = None,
) -> None:
    """Writes `config.yaml`, `ds_config.json` and `run.json` into the run's folder, each whole. Raises InputError if
    that is not possible.

    Args:
        parameters: (total, trainable) by part.
        identity: see `vltrain.train.run.identity.run_identity`.
        tokenizer: its fingerprint, as it is used.
        data: the packs, their checksum, what they were made from, and the digest of the samples.
        full_qformer: of an InstructBLIP, what full tuning of its Q-Former would train: the paper's 100%.
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    facts = {
        "command": sys.argv,
        "commit": code_commit(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "device": device,
        "ranks": world_size,
        "threads_per_rank": torch.get_num_threads(),
        "parameters": {
            part: {"total": total, "trainable": trainable} for part, (total, trainable) in parameters.items()
        },
        "tokenizer_fingerprint": tokenizer,
        "data": data,
        "identity": identity,
        "settings": load_text(resolved_config),
    }
    if full_qformer is not None:
        facts["full_qformer"] = full_qformer
    write_whole(folder / RECIPE, resolved_config)
    write_json(folder / "ds_config.json", ds_config)
    write_json(folder / RUN, facts)


def make_run_folder(folder: Path) -> None:
    """Makes the run's folder and tries it out. Raises InputError if nothing can be written there."""
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"run folder {folder}: cannot be written ({error.strerror}); choose another --output"
        ) from None
