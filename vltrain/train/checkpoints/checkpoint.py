"""Checkpoints: the trainable state, whole, so that any number of ranks and any ZeRO stage can go on from it.

    checkpoints/step-00000200/
        weights-00001.safetensors     trainable parameters by full name, fp32
        optimizer-00001.safetensors   exp_avg/NAME and exp_avg_sq/NAME, fp32
        extra-00001.safetensors       what else a run has to remember in tensors (AdaLoRA's averages), if anything
        checkpoint.json               step, what it belongs to, the run's state, and size and SHA-256 of the files above
    checkpoints/latest                the name of the newest complete one
    checkpoints/best                  with train.keep_best: the name of the one with the best evaluation

Frozen weights are never saved. A checkpoint is written beside its name, flushed to disk, read back and compared, and
renamed, so a crash or a full disk leaves the older ones as they were; one that cannot be used (damaged, of another
version, not readable) is skipped with a warning, and stays (`vltrain.train.checkpoints.retention`); where none can be
used, nothing starts anew (`vltrain.receipts.manifest`). Nothing but safetensors and JSON is read, only files that the
manifest lists, and no link is followed: a checkpoint from elsewhere can hold wrong numbers, but no code.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vltrain.errors import InputError
from vltrain.files.atomic import sync
from vltrain.files.digest import sha256_of
from vltrain.files.tensors import save_file
from vltrain.models.interface import VisionLanguageModel
from vltrain.receipts.manifest import (
    FORMAT_VERSION,
    LATEST,
    MANIFEST,
    checkpoint_name,
    checkpoints_in,
    dumps,
    newest_in,
    read_manifest,
    verify_files,
)
from vltrain.train.checkpoints.retention import point, prune, put_in_place

logger = logging.getLogger(__name__)

SHARD_BYTES = 2 * 1024**3  # of the host memory that a save needs beside the model
NAMED = 4  # parameters that an error names of each kind
KINDS = ("weights", "optimizer", "extra")
ADALORA_KEPT = "adalora/kept/"  # of `Checkpoint.extra`, see `vltrain.train.adalora.RankAllocator.state`


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint on disk. `belongs_to` is what must be equal for a run to go on from it exactly.

    run_state: what the run remembers beside tensors (chain of the receipt, early stopping, ...), as `Trainer.run_state`
    gave it.
    files: names of the files that the manifest lists.
    digest: the manifest's own checksum: of two checkpoints with the same one every byte is the same.
    is_origin: of another run, which the model's own begins with (`train.init_from`), and which may have trained less of
    it.
    """

    path: Path
    step: int
    belongs_to: dict[str, Any]
    run_state: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    digest: str = ""
    is_origin: bool = False

    @property
    def precision(self) -> str | None:
        """What its run computes in, as `train.precision` names it; None where its version did not say."""
        return self.run_state.get("precision")

    def _files(self, kind: str) -> list[Path]:
        return [self.path / name for name in sorted(self.files) if name.startswith(f"{kind}-")]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Trainable parameters by full name, one at a time, fp32 on the CPU."""
        return _tensors(self._files("weights"))

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of `weights` by name, read off the files' heads."""
        return {name: tuple(shape) for file in self._files("weights") for name, shape in _shapes(file)}

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
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not iterable)
                if name.startswith(prefix):
                    yield name, tensors.get_tensor(name)


def _shapes(file: Path) -> Iterator[tuple[str, list[int]]]:
    with _opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not iterable)
            yield name, tensors.get_slice(name).get_shape()


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:  # the checksums hold, so it was made like that
        raise InputError(f"{file}: not a safetensors file ({error}); do not use this checkpoint") from None
    except OSError as error:
        raise InputError(
            f"{file}: can no longer be read ({error.strerror or error}); was it removed meanwhile?"
        ) from None


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
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(self.folder.iterdir())
        }
        manifest = {
            "format": FORMAT_VERSION,
            "step": step,
            "belongs_to": belongs_to,
            "run_state": run_state,
            "files": files,
        }
        path = self.folder / MANIFEST
        path.write_text(dumps(manifest))
        sync(path)
        sync(self.folder)


def _require_written(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Reads a file back. Raises OSError if it does not hold the tensors, bit for bit: the checksums to come are of what
    was meant."""
    try:
        with safe_open(path, framework="pt") as written:
            differing = [
                name
                for name, tensor in tensors.items()
                if not torch.equal(_bytes(written.get_tensor(name)), _bytes(tensor))
            ]
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be read back: {error}") from error
    if differing:
        raise OSError(f"{path}: '{differing[0]}' reads back with other values than were written")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def save_checkpoint(
    state: Iterator,
    root: Path,
    *,
    step: int,
    belongs_to: dict[str, Any],
    keep: int,
    is_writer: bool,
    run_state: dict[str, Any] | None = None,
    extra: Mapping[str, torch.Tensor] | None = None,
    keep_best: bool = False,
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
    if not is_writer:
        for _ in state:  # a collective
            pass
        return final
    writer = CheckpointWriter(partial)
    failure = _write_state(state, writer)
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
        raise InputError(
            f"{final}: the checkpoint could not be saved ({error}); free some disk space and resume from the newest "
            f"one ({newest}) with --resume auto"
        ) from None
    return final


def _write_state(state: Iterator, writer: CheckpointWriter) -> OSError | None:
    """Writes a state into a new folder; returns what went wrong. The state is drained to its end even then: the other
    ranks take part in its collectives."""
    failure: OSError | None = None
    try:
        shutil.rmtree(writer.folder, ignore_errors=True)
        writer.folder.mkdir(parents=True)
    except OSError as error:
        failure = error
    for name, weight, states in state:
        if failure is not None:
            continue
        try:
            writer.add("weights", name, weight)
            for key, value in states.items():
                writer.add("optimizer", f"{key}/{name}", value)
        except OSError as error:
            failure = error
    return failure


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

    Others are skipped with a warning. Raises: InputError where there are checkpoints and none can be used, with the
    reason for each.
    """
    return newest_in(root, open_checkpoint, until)


def load_trainable(
    model: VisionLanguageModel,
    checkpoint: Checkpoint,
    gathered: Callable[[torch.nn.Parameter], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Copies the checkpoint's weights into the model's trainable parameters, after names and shapes were checked.

    Args:
        gathered: a context in which a parameter that is partitioned among ranks is whole and can be written; see
            `vltrain.train.zero.engine.gathered`.

    Raises:
        InputError: names or shapes differ: a checkpoint of another model.
    """
    require_fit(checkpoint, model)
    expected = dict(model.named_parameters())
    for name, tensor in checkpoint.weights():
        with gathered(expected[name]):
            expected[name].data.copy_(tensor)


def require_fit(checkpoint: Checkpoint, model: VisionLanguageModel) -> dict[str, int]:
    """Raises InputError, naming parameters, if the checkpoint's are not those that the model trains, by name and shape.
    On the meta device, too.

    What the run of an origin (`Checkpoint.is_origin`) trained nothing of may begin as it would without: adapters behind
    a neck that was trained alone.

    Returns: by such a part (see `VisionLanguageModel.PARTS`), how many numbers begin anew.
    """
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    expected = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in trained}
    found = checkpoint.weight_shapes()
    there = {model.part_of(name) for name in found if name in expected} if checkpoint.is_origin else set()
    new = {name: math.prod(shape) for name, shape in expected.items() if there and model.part_of(name) not in there}
    expected = {name: shape for name, shape in expected.items() if name not in new}
    problems = {
        "lacks {} trained parameter(s)": sorted(expected.keys() - found.keys()),
        "has {} that this model does not train": sorted(found.keys() - expected.keys()),
        "has {} that do not fit": [
            f"{name} has the shape {list(found[name])}, expected {list(expected[name])}"
            for name in sorted(found.keys() & expected.keys())
            if found[name] != expected[name]
        ],
    }
    told = [
        f"{problem.format(len(names))}: {', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''}"
        for problem, names in problems.items()
        if names
    ]
    if told:
        raise InputError(f"{checkpoint.path}: a checkpoint of another model or recipe: {'; '.join(told)}")
    begins: Counter[str] = Counter()
    for name, count in new.items():
        begins[model.part_of(name)] += count
    return dict(begins)
