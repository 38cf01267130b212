"""Checkpoints: the trainable state, whole, so that any number of ranks and any ZeRO stage can go on from it.

    checkpoints/step-00000200/
        weights-00001.safetensors     trainable parameters by full name, fp32
        optimizer-00001.safetensors   exp_avg/NAME and exp_avg_sq/NAME, fp32
        extra-00001.safetensors       what else a run has to remember in tensors (AdaLoRA's averages), if anything
        checkpoint.json               step, what it belongs to, the run's state, and size and SHA-256 of the files above
    checkpoints/latest                the name of the newest complete one
    checkpoints/best                  with train.keep_best: the name of the one with the best evaluation

Frozen weights are never saved. A checkpoint is written beside its name, flushed to disk, read back and compared, and renamed, so a crash
or a full disk leaves the older ones as they were; one that cannot be used (damaged, of another version, not readable) is skipped with a warning,
and stays (`vltrain.train.retention`); where none can be used, nothing starts anew (`vltrain.check.manifest`). Nothing but safetensors and
JSON is read, only files that the manifest lists, and no link is followed: a checkpoint from elsewhere can hold wrong numbers, but no
code.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vltrain.check.manifest import FORMAT_VERSION, LATEST, MANIFEST, checkpoint_name, checkpoints_in, dumps, newest_in, read_manifest, sha256_of, verify_files
from vltrain.errors import InputError
from vltrain.files.tensors import save_file
from vltrain.older_runs import ADDED
from vltrain.train.retention import point, prune, put_in_place, sync

logger = logging.getLogger(__name__)

SHARD_BYTES = 2 * 1024**3  # of the host memory that a save needs beside the model
KINDS = ("weights", "optimizer", "extra")
ADALORA_KEPT = "adalora/kept/"  # of `Checkpoint.extra`, see `vltrain.train.adalora.RankAllocator.state`


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint on disk. `belongs_to` is what must be equal for a run to go on from it exactly.

    run_state: what the run remembers beside tensors (chain of the receipt, early stopping, ...), as `Trainer.run_state` gave it.
    files: names of the files that the manifest lists.
    digest: the manifest's own checksum: of two checkpoints with the same one every byte is the same.
    """

    path: Path
    step: int
    belongs_to: dict[str, Any]
    run_state: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    digest: str = ""

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
        except OSError as error:
            raise InputError(f"{file}: cannot be read any more ({error.strerror or error}); was it removed meanwhile?") from None


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
        save_file(self._pending[kind], path)
        sync(path)
        _require_written(path, self._pending[kind])
        self._pending[kind] = {}

    def finish(self, step: int, belongs_to: dict[str, Any], run_state: dict[str, Any]) -> None:
        """Writes what is pending and the manifest that makes the folder a checkpoint."""
        for kind in KINDS:
            self.flush(kind)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(self.folder.iterdir())}
        manifest = {"format": FORMAT_VERSION, "step": step, "belongs_to": belongs_to, "run_state": run_state, "files": files}
        path = self.folder / MANIFEST
        path.write_text(dumps(manifest))
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
        put_in_place(partial, final, is_whole)
        point(root, LATEST, final.name)
        prune(root, final, keep, keep_best, is_whole)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        newest = next((path.name for path in _listed(root)), "none")
        raise InputError(f"{final}: the checkpoint could not be saved ({error}); free some disk space and go on from the newest one ({newest}) with --resume auto") from None
    return final


def _listed(root: Path) -> list[Path]:
    try:
        return checkpoints_in(root)
    except InputError:
        return []


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens and verifies one checkpoint folder. Raises InputError naming what is missing or damaged."""
    manifest = read_manifest(path)
    verify_files(manifest)
    told = {name: getattr(manifest, name) for name in ("path", "step", "belongs_to", "run_state", "digest")}
    return Checkpoint(**told, files=tuple(manifest.files))


def is_whole(path: Path) -> bool:
    """Whether `open_checkpoint` takes a folder."""
    try:
        open_checkpoint(path)
    except InputError:
        return False
    return True


def newest_checkpoint(root: Path, until: int | None = None) -> Checkpoint | None:
    """The newest usable checkpoint under `root`, of no later step than `until`; None where there is none at all.

    Others are skipped with a warning. Raises: InputError where there are checkpoints and none can be used, with the reason for each.
    """
    return newest_in(root, open_checkpoint, until)


def require_same_run(checkpoint: Checkpoint, belongs_to: dict[str, Any]) -> None:
    """Raises InputError, naming each difference, if a run described by `belongs_to` cannot go on exactly from the checkpoint."""
    differences = list(_differences(checkpoint.belongs_to, belongs_to))
    if differences:
        raise InputError(f"{checkpoint.path}: belongs to another run: " + "; ".join(differences) + ". Restore these settings, or train into another --output")


def _differences(saved: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in sorted(saved.keys() | now.keys()):
            here = f"{path}.{key}" if path else key
            before = {} if isinstance(now.get(key), dict) else _plain(ADDED.get(here))  # of a setting that its version did not know
            yield from _differences(saved.get(key, before), now.get(key), here)
    elif saved != now:
        yield f"{path} was {saved!r}, is {now!r}"


def _plain(value: Any) -> Any:
    """As it comes back from a checkpoint."""
    return list(value) if isinstance(value, tuple) else value


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
