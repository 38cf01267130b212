"""Checkpoints: the trainable state, whole, so that any number of ranks and any ZeRO stage can go on from it.

    checkpoints/step-00000200/
        weights-00001.safetensors     trainable parameters by full name, fp32
        optimizer-00001.safetensors   exp_avg/NAME and exp_avg_sq/NAME, fp32
        extra-00001.safetensors       what else a run has to remember in tensors (AdaLoRA's averages), if anything
        checkpoint.json               step, what it belongs to, the run's state, and size and SHA-256 of the files above
    checkpoints/latest                the name of the newest complete one
    checkpoints/best                  with train.keep_best: the name of the one with the best evaluation

Frozen weights are never saved. A checkpoint is written beside its name, flushed to disk, read back and compared, and renamed, so a crash
or a full disk leaves the older ones as they were; one whose checksums do not match is skipped with a warning. Nothing but safetensors and
JSON is read, only files that the manifest lists, and no link is followed: a checkpoint from elsewhere can hold wrong numbers, but no
code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vltrain.errors import InputError
from vltrain.train.retention import LATEST, checkpoint_name, point, prune, put_in_place, sync

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
SHARD_BYTES = 2 * 1024**3  # of the host memory that a save needs beside the model
MANIFEST = "checkpoint.json"
KINDS = ("weights", "optimizer", "extra")
ADALORA_KEPT = "adalora/kept/"  # of `Checkpoint.extra`, see `vltrain.train.adalora.RankAllocator.state`
MAX_MANIFEST_BYTES = 16 * 1024**2
FILE_NAME = re.compile(r"([a-z_]+)-[0-9]{5}\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint on disk. `belongs_to` is what must be equal for a run to go on from it exactly.

    run_state: what the run remembers beside tensors (chain of the receipt, early stopping, ...), as `Trainer.run_state` gave it.
    files: names of the files that the manifest lists.
    """

    path: Path
    step: int
    belongs_to: dict[str, Any]
    run_state: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    def _files(self, kind: str) -> list[Path]:
        return [self.path / name for name in sorted(self.files) if name.startswith(f"{kind}-")]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Trainable parameters by full name, one at a time, fp32 on the CPU."""
        return _tensors(self._files("weights"))

    def optimizer_states(self) -> dict[str, dict[str, torch.Tensor]]:
        """{parameter name: {"exp_avg": ..., "exp_avg_sq": ...}}"""
        states: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in _tensors(self._files("optimizer")):
            kind, _, name = key.partition("/")
            states.setdefault(name, {})[kind] = tensor
        return states

    def extra(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The run's other tensors, as `save_checkpoint` was given them; those alone whose names begin with `prefix`."""
        return dict(_tensors(self._files("extra"), prefix))


def kept_by_adalora(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Layer -> bool [r], which directions AdaLoRA's last pruning kept; {} without AdaLoRA, or before it."""
    return {name.removeprefix(ADALORA_KEPT): mask for name, mask in checkpoint.extra(ADALORA_KEPT).items()}


def _tensors(files: list[Path], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    if name.startswith(prefix):
                        yield name, tensors.get_tensor(name)
        except SafetensorError as error:  # the checksums hold, so it was made like that
            raise InputError(f"{file}: not a safetensors file ({error}); do not use this checkpoint") from None


class CheckpointWriter:
    """Collects whole tensors on rank 0 and writes them in shards of bounded size. On other ranks it only consumes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pending: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in KINDS}
        self._num_shards = dict.fromkeys(KINDS, 0)

    def add(self, kind: str, name: str, tensor: torch.Tensor) -> None:
        pending = self._pending[kind]
        pending[name] = tensor.contiguous()
        if sum(value.nbytes for value in pending.values()) >= SHARD_BYTES:
            self.flush(kind)

    def flush(self, kind: str) -> None:
        if not self._pending[kind]:
            return
        self._num_shards[kind] += 1
        path = self.folder / f"{kind}-{self._num_shards[kind]:05d}.safetensors"
        try:
            save_file(self._pending[kind], path)
        except SafetensorError as error:  # its way to report a failed write
            raise OSError(f"{path}: {error}") from error
        sync(path)
        _require_written(path, self._pending[kind])
        self._pending[kind] = {}

    def finish(self, step: int, belongs_to: dict[str, Any], run_state: dict[str, Any]) -> None:
        """Writes what is pending and the manifest that makes the folder a checkpoint."""
        for kind in KINDS:
            self.flush(kind)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(self.folder.iterdir())}
        manifest = {"format": FORMAT_VERSION, "step": step, "belongs_to": belongs_to, "run_state": run_state, "files": files}
        path = self.folder / MANIFEST
        path.write_text(_dumps(manifest))
        sync(path)
        sync(self.folder)


def _require_written(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Reads a file back. Raises OSError if it does not hold the tensors, bit for bit: the checksums to come are of what was meant."""
    try:
        with safe_open(path, framework="pt") as written:
            differing = [name for name, tensor in tensors.items() if not torch.equal(_bytes(written.get_tensor(name)), _bytes(tensor))]
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be read back: {error}") from error
    if differing:
        raise OSError(f"{path}: '{differing[0]}' reads back as something else than was written")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def save_checkpoint(
    state: Iterator, root: Path, *, step: int, belongs_to: dict[str, Any], keep: int, is_writer: bool,
    run_state: dict[str, Any] | None = None, extra: Mapping[str, torch.Tensor] | None = None, keep_best: bool = False,
) -> Path:
    """Writes a checkpoint of `state` (see `Engine.full_state`) and drops all but the newest `keep`.

    A collective: every rank calls it, the one with `is_writer` writes.

    Args:
        run_state: see `Checkpoint`; plain JSON.
        extra: tensors beside the state, see `Checkpoint.extra`.
        keep_best: keep also the one that is named `best`.

    Raises:
        InputError: (writer only) the disk is full or not writable; older checkpoints are untouched.
    """
    final = root / checkpoint_name(step)
    partial = root / f".partial-{final.name}"
    failure: OSError | None = None
    writer = CheckpointWriter(partial)
    if is_writer:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            failure = error
    # The state is drained to its end even after a failure: the other ranks take part in its collectives.
    for name, weight, states in state:
        if not is_writer or failure is not None:
            continue
        try:
            writer.add("weights", name, weight)
            for key, value in states.items():
                writer.add("optimizer", f"{key}/{name}", value)
        except OSError as error:
            failure = error
    if not is_writer:
        return final
    try:
        if failure is not None:
            raise failure
        for name, tensor in (extra or {}).items():
            writer.add("extra", name, tensor)
        writer.finish(step, belongs_to, run_state or {})
        put_in_place(partial, final)
        point(root, LATEST, final.name)
        prune(root, final, keep, keep_best)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        newest = max((path.name for path in root.glob("step-*")), default="none")
        raise InputError(f"{final}: the checkpoint could not be saved ({error}); free some disk space and go on from the newest one ({newest}) with --resume auto") from None
    return final


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens and verifies one checkpoint folder. Raises InputError naming what is missing or damaged."""
    manifest = _read_manifest(path)
    step, belongs_to, run_state, files = manifest["step"], manifest["belongs_to"], manifest.get("run_state", {}), manifest["files"]
    for name, expected in files.items():
        file = path / name
        if not FILE_NAME.fullmatch(name) or file.is_symlink():
            raise InputError(f"{path / MANIFEST}: lists {name!r}, expected plain files of the checkpoint's own folder; do not use it")
        size = file.stat().st_size if file.is_file() else None
        if size != expected["bytes"]:
            raise InputError(f"{file}: {'missing' if size is None else f'{size} bytes'}, expected {expected['bytes']} bytes; the checkpoint is damaged")
        if _sha256(file) != expected["sha256"]:
            raise InputError(f"{file}: its SHA-256 differs from the manifest's; the checkpoint is damaged")
    return Checkpoint(path=path, step=step, belongs_to=belongs_to, run_state=run_state, files=tuple(files))


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint's folder, its own checksum checked. Raises InputError."""
    try:
        with (path / MANIFEST).open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
        if len(data) > MAX_MANIFEST_BYTES:
            raise ValueError(f"larger than {MAX_MANIFEST_BYTES} bytes")
        manifest = json.loads(data)
        claimed = manifest.pop("sha256")
        version, *_ = (manifest[key] for key in ("format", "step", "belongs_to", "files"))
        # Its text, too, is as it was written: `1e-5` for `1E-5` would be the same number, but a damaged file all the same.
        whole = _checksum(manifest) == claimed and data == _dumps(manifest).encode()
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not a complete checkpoint ({MANIFEST}: {type(error).__name__}: {error})") from None
    if not whole:
        raise InputError(f"{path / MANIFEST}: its checksum does not match its content; the file is damaged")
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: checkpoint format {version}, this version reads {FORMAT_VERSION}")
    return manifest


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint under `root`, or None. Damaged ones are skipped with a warning."""
    for path in sorted(root.glob("step-*"), reverse=True):
        try:
            return open_checkpoint(path)
        except InputError as error:
            logger.warning("skipped a checkpoint: %s", error)
    return None


def require_same_run(checkpoint: Checkpoint, belongs_to: dict[str, Any]) -> None:
    """Raises InputError, naming each difference, if a run described by `belongs_to` cannot go on exactly from the checkpoint."""
    differences = list(_differences(checkpoint.belongs_to, belongs_to))
    if differences:
        raise InputError(f"{checkpoint.path}: belongs to another run: " + "; ".join(differences) + ". Restore these settings, or train into another --output")


def _differences(saved: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in sorted(saved.keys() | now.keys()):
            yield from _differences(saved.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif saved != now:
        yield f"{path} was {saved!r}, is {now!r}"


def load_trainable(
    model: torch.nn.Module, checkpoint: Checkpoint, whole: Callable[[torch.nn.Parameter], AbstractContextManager[Any]] = nullcontext
) -> None:
    """Copies the checkpoint's weights into the model's trainable parameters.

    Args:
        whole: a context in which a parameter that is cut up among ranks is whole and can be written; see `vltrain.train.engine.whole`.

    Raises:
        InputError: names or shapes differ: a checkpoint of another model.
    """
    expected = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = set()
    for name, tensor in checkpoint.weights():
        if name not in expected:
            raise InputError(f"{checkpoint.path}: has '{name}', which this model does not train: a checkpoint of another model or recipe")
        with whole(expected[name]):
            if tensor.shape != expected[name].shape:
                raise InputError(
                    f"{checkpoint.path}: '{name}' has shape {tuple(tensor.shape)}, this model's is {tuple(expected[name].shape)}: a checkpoint of another model or recipe"
                )
            expected[name].data.copy_(tensor)
        found.add(name)
    missing = sorted(expected.keys() - found)
    if missing:
        raise InputError(f"{checkpoint.path}: lacks {len(missing)} trained parameter(s), first '{missing[0]}': a checkpoint of another model or recipe")


def _dumps(manifest: dict[str, Any]) -> str:
    """The text of a manifest's file, with its checksum."""
    return json.dumps({**manifest, "sha256": _checksum(manifest)}, indent=1)


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
