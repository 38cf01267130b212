"""Packs to batches, ahead of the training loop, for one rank.

Worker processes read a pack and decode its images, one pack per task, each distinct image once. The little that is left
(labels, positions) is done in the training process: it takes microseconds, and so only two small arrays and one block
of pixels pass between processes.
The order is the plan's, whatever the number of workers. Trade-off: no decoding on the accelerator.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from vltrain.batch import Batch, tensor_of
from vltrain.data.images import decode_image
from vltrain.data.plan import FILLER, Plan, StepPlan
from vltrain.data.shards import PackedDataset
from vltrain.distributed.signals import block_signals_in_workers, end_with_parent
from vltrain.errors import InputError
from vltrain.schema import IGNORE_INDEX, IMAGE_MODALITY_TOKEN, SQUARE, TEXT_MODALITY_TOKEN, Framing, PackedRow, Segment

PREFETCH_PACKS = 4  # per worker
POLL_SECONDS = 2.0  # between two looks at workers that let us wait


@dataclass(kw_only=True)
class LoadedStep:
    """One optimizer step of one rank: a batch per micro-step."""

    step: int
    batches: list[Batch]
    plan: StepPlan


def blank_image(image_size: int) -> np.ndarray:
    """The image of a batch that has none but must run the vision tower: uint8 [3, H, W], black."""
    return np.zeros((3, image_size, image_size), np.uint8)


def collate(row: PackedRow, images: list[np.ndarray], image_size: int) -> Batch:
    """Makes a batch of a pack.

    Args:
        images: uint8 [3, H, W] each, one for each of `row.image_ids`; or one blank image for a row that has none.
        image_size: H and W, the shape of `pixels` where there is no image.

    Returns:
        A Batch. labels[t] is input_ids[t + 1] where that token is to be predicted and of the same segment, else
        IGNORE_INDEX.
    """
    pixels = np.stack(images) if images else np.empty((0, 3, image_size, image_size), np.uint8)
    return _assemble(row, tensor_of(pixels))


def batch_of(
    segments: Sequence[Segment], images: Mapping[str, np.ndarray], image_size: int, blank: bool = False
) -> Batch:
    """A batch of tokenised samples that come from no shard.

    Args:
        images: by name, uint8 [3, H, W], those that the segments show.
        blank: give the batch a blank image if they show none.
    """
    names = list(dict.fromkeys(name for segment in segments for name in segment.images))
    instructions = [segment.instruction_ids for segment in segments]
    has_instruction = any(map(len, instructions))
    row = PackedRow(
        input_ids=np.concatenate([segment.input_ids for segment in segments]),
        loss_mask=np.concatenate([segment.loss_mask for segment in segments]),
        segment_lengths=np.array([len(segment.input_ids) for segment in segments], np.int32),
        image_ids=np.arange(len(names), dtype=np.int64),
        image_slots=np.array([names.index(name) for segment in segments for name in segment.images], np.int32),
        sample_ids=tuple(segment.sample_id for segment in segments),
        instruction_ids=np.concatenate(instructions),
        instruction_lengths=np.array([len(ids) for ids in instructions] if has_instruction else [], np.int32),
    )
    shown = [images[name] for name in names]
    return collate(row, [blank_image(image_size)] if blank and not shown else shown, image_size)


def _assemble(row: PackedRow, pixels: torch.Tensor) -> Batch:
    assert len(pixels) == max(len(row.image_ids), min(len(pixels), 1)), (len(pixels), len(row.image_ids))
    lengths = row.segment_lengths.astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    input_ids = row.input_ids.astype(np.int64)
    labels = np.full(len(input_ids), IGNORE_INDEX, np.int64)
    labels[:-1] = np.where(row.loss_mask[1:], input_ids[1:], IGNORE_INDEX)
    labels[starts[1:] - 1] = IGNORE_INDEX  # a segment's last token predicts nothing, least of all the next segment
    num_label_tokens = int((labels != IGNORE_INDEX).sum())
    assert num_label_tokens == int(row.loss_mask.sum()), "a segment's first token cannot be predicted"
    return Batch(
        input_ids=tensor_of(input_ids),
        labels=tensor_of(labels),
        position_ids=tensor_of(np.arange(len(input_ids)) - np.repeat(starts, lengths)),
        segment_lengths=tensor_of(lengths),
        label_lengths=tensor_of(np.add.reduceat(row.loss_mask, starts, dtype=np.int64)),
        pixels=pixels,
        image_slots=tensor_of(row.image_slots.astype(np.int64)),
        instruction_ids=_padded(row.instruction_ids, row.instruction_lengths, len(lengths)),
        sample_ids=row.sample_ids,
        num_label_tokens=num_label_tokens,
    )


def _padded(ids: np.ndarray, lengths: np.ndarray, num_rows: int) -> torch.Tensor:
    """Rows one after another -> int64 [num_rows, longest], -1 behind each; [num_rows, 0] where there is none."""
    if len(lengths) == 0:
        return torch.empty(num_rows, 0, dtype=torch.int64)
    rows = np.full((num_rows, int(lengths.max())), -1, np.int64)
    rows[np.arange(rows.shape[1]) < lengths[:, None]] = ids
    return tensor_of(rows)


def filler(image: bool, image_size: int) -> Batch:
    """A batch of two tokens and no label for a rank without a pack; with `image`, one blank image that no slot refers
    to."""
    images = [blank_image(image_size)] if image else []
    row = PackedRow(
        input_ids=np.array([IMAGE_MODALITY_TOKEN if image else TEXT_MODALITY_TOKEN, 0], np.int32),
        loss_mask=np.zeros(2, bool),
        segment_lengths=np.array([2], np.int32),
        image_ids=np.empty(0, np.int64),
        image_slots=np.empty(0, np.int32),
        sample_ids=("filler",),
        instruction_ids=np.zeros(1, np.int32),
        instruction_lengths=np.ones(1, np.int32),
    )
    batch = collate(row, images, image_size)
    batch.is_filler = True
    return batch


class _Fetcher(Dataset[tuple[PackedRow, torch.Tensor] | str]):
    """Runs in workers: (pack number, whether the micro-step has images) to a row and its pixels, or to an error's
    text."""

    def __init__(
        self, dataset: PackedDataset, image_size: int, max_image_pixels: int, framing: Framing = SQUARE
    ) -> None:
        self._dataset, self._image_size, self._max_image_pixels, self._framing = (
            dataset,
            image_size,
            max_image_pixels,
            framing,
        )

    def __getitem__(self, item: tuple[int, bool]) -> tuple[PackedRow, torch.Tensor] | str:
        # An exception would come out of the DataLoader with the worker's traceback in its message.
        try:
            return self._fetch(*item)
        except InputError as error:
            return str(error)
        except (OSError, MemoryError) as error:
            return (
                f"{self._dataset.folder}: pack {item[0]} cannot be read ({type(error).__name__}: {error}); look at "
                "this file system and at the host's memory"
            )

    def _fetch(self, number: int, has_images: bool) -> tuple[PackedRow, torch.Tensor]:
        row = self._dataset.row(number)
        size = self._image_size
        blank = has_images and len(row.image_ids) == 0
        pixels = _shared_pixels(1 if blank else len(row.image_ids), size)
        for place, image_id in enumerate(row.image_ids.tolist()):
            where = (
                f"{self._dataset.folder}: image {image_id} of pack {number} (samples "
                f"{', '.join(row.sample_ids[:3])} ...)"
            )
            pixels[place] = tensor_of(
                decode_image(self._dataset.image(image_id), size, self._max_image_pixels, where, self._framing)
            )
        return row, pixels


def _shared_pixels(num_images: int, size: int) -> torch.Tensor:
    """uint8 [num_images, 3, size, size], black; in a worker in memory that it shares with the trainer.

    Made shared here and not, as the queue would, in its thread on the way out: that tells nobody if it fails, and the
    trainer waits for ever.

    Raises: InputError if there is no room for it.
    """
    pixels = torch.zeros((num_images, 3, size, size), dtype=torch.uint8)
    if get_worker_info() is None or pixels.nbytes == 0:
        return pixels
    try:
        pixels.share_memory_()
    except (RuntimeError, OSError) as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0].strip()
        raise InputError(
            f"an image worker could not share {pixels.nbytes / 2**20:.1f} MiB with the trainer "
            f"({detail}); give the machine or container a "
            "larger /dev/shm (docker run --shm-size 8g), raise ulimit -n, lower data.workers, or decode in the "
            "trainer with data.workers 0"
        ) from None
    return pixels


class _PlanSampler(Sampler[tuple[int, bool]]):
    """The packs of one rank, in order, fillers left out."""

    def __init__(self, plan: Plan, rank: int, start_step: int) -> None:
        self._plan, self._rank, self._start_step = plan, rank, start_step

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        for number in range(self._start_step, self._plan.num_steps):
            for pack, has_images in _share(self._plan.step(number), self._rank):
                if pack != FILLER:
                    yield pack, has_images


def _share(step: StepPlan, rank: int) -> Iterator[tuple[int, bool]]:
    """A rank's part of a step: per micro-step its pack and whether any rank has an image then."""
    return zip(step.packs[:, rank].tolist(), step.has_images.tolist(), strict=True)


def _kill(workers: list[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


class StepLoader:
    """Iterates the steps of one rank, from `start_step` on, as `LoadedStep`s."""

    def __init__(
        self,
        dataset: PackedDataset,
        plan: Plan,
        rank: int,
        image_size: int,
        max_image_pixels: int,
        workers: int,
        start_step: int = 0,
        pin_memory: bool = False,
        while_waiting: Callable[[], None] = lambda: None,
        framing: Framing = SQUARE,
    ) -> None:
        """Args:
        framing: how images become squares of `image_size`.
        workers: processes that decode; 0 decodes in this one.
        pin_memory: give batches in pinned memory, so that nothing waits for their copy to a GPU but the work that reads
        them.
        while_waiting: called every POLL_SECONDS while the workers let us wait. Bounds the wait, if anything does: it
        may raise.
        """
        self.while_waiting = while_waiting
        self._plan, self._rank, self._image_size, self._start_step = plan, rank, image_size, start_step
        self._pin_memory = pin_memory
        self._loader: DataLoader[tuple[PackedRow, torch.Tensor] | str] | None = DataLoader(
            _Fetcher(dataset, image_size, max_image_pixels, framing),
            sampler=_PlanSampler(plan, rank, start_step),
            batch_size=None,
            num_workers=workers,
            timeout=POLL_SECONDS if workers else 0,
            prefetch_factor=PREFETCH_PACKS if workers else None,
            persistent_workers=workers > 0,
            # forking a process that has threads or a GPU is not safe
            multiprocessing_context="spawn" if workers else None,
            worker_init_fn=_begin_worker if workers else None,
            pin_memory=pin_memory,  # the pixels, which come alone from the workers, in a thread; the rest below
            generator=torch.Generator(),  # else the loader would draw from the generator that dropout uses
        )

    def __len__(self) -> int:
        return max(0, self._plan.num_steps - self._start_step)

    def close(self) -> None:
        """Ends the workers, once nobody iterates any more. Left to the interpreter's end, they would be killed."""
        self._loader = None

    def _start(self) -> Iterator[tuple[PackedRow, torch.Tensor] | str]:
        """Starts the workers. That one of them died is told where the next pack is wanted, and not by an exception amid
        a training step."""
        assert self._loader is not None, "closed"
        before = signal.getsignal(signal.SIGCHLD)
        others = multiprocessing.active_children()
        with block_signals_in_workers():
            fetched = iter(self._loader)
        # Where an error ends the process before `close`, the interpreter would wait for ever for workers that cannot
        # hear its signal.
        atexit.register(_kill, [child for child in multiprocessing.active_children() if child not in others])
        # torch's handler, which raises wherever the process is just then
        if signal.getsignal(signal.SIGCHLD) is not before:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        return fetched

    def __iter__(self) -> Iterator[LoadedStep]:
        fetched = self._start()
        for number in range(self._start_step, self._plan.num_steps):
            step = self._plan.step(number)
            batches = [
                filler(has_images, self._image_size) if pack == FILLER else self._unwrap(fetched)
                for pack, has_images in _share(step, self._rank)
            ]
            if self._pin_memory:
                batches = [batch.pin_memory() for batch in batches]
            yield LoadedStep(step=number, batches=batches, plan=step)

    def _unwrap(self, fetched: Iterator[tuple[PackedRow, torch.Tensor] | str]) -> Batch:
        """The next batch; InputError if its images cannot be decoded, or if a worker process died or cannot hand
        over."""
        while True:
            try:
                found = next(fetched)
                break
            except (RuntimeError, ConnectionError, EOFError) as error:  # the last two: it died while handing over
                detail = (str(error).splitlines() or [type(error).__name__])[0].strip()
                if isinstance(error, RuntimeError) and detail.startswith("DataLoader timed out"):
                    self.while_waiting()
                    continue
                if isinstance(error, RuntimeError) and detail.startswith(
                    ("Too many open files", "received 0 items of ancdata")
                ):
                    raise InputError(
                        f"an image worker could not send its batch ({detail}); raise ulimit -n, or lower data.workers"
                    ) from None
                if isinstance(error, RuntimeError) and not detail.startswith("DataLoader worker"):
                    raise
            raise InputError(
                f"an image worker was killed ({detail}, likely out of memory); lower data.workers"
            ) from None
        if isinstance(found, str):
            raise InputError(found)
        return _assemble(*found)


def _begin_worker(_: int) -> None:
    end_with_parent()
    torch.set_num_threads(1)
