"""Packs to batches, ahead of the training loop, for one rank.

Worker processes read a pack and decode its images, one pack per task, each distinct image once. The little that is left
(labels, positions) is done in the training process: it takes microseconds, and so only two small arrays and one block
of pixels pass between processes. The order is the plan's, whatever the number of workers. Trade-off: no decoding on the
accelerator.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from vltrain.batch import Batch, ImageFeatures, ImageInputs, Shown, listed, tensor_of
from vltrain.data.kept.store import KeptImages
from vltrain.data.pictures import ImageReader
from vltrain.data.plan import FILLER, Plan, StepPlan
from vltrain.data.shards import PackedDataset
from vltrain.distributed.signals import block_signals_in_workers, end_with_parent
from vltrain.errors import InputError
from vltrain.schema import IGNORE_INDEX, PackedRow, Segment

PREFETCH_PACKS = 4  # per worker
POLL_SECONDS = 2.0  # between two looks at workers that let us wait


@dataclass(kw_only=True)
class LoadedStep:
    """One optimizer step of one rank: a batch per micro-step."""

    step: int
    batches: list[Batch]
    plan: StepPlan


def collate(row: PackedRow, pictures: list[np.ndarray], reader: ImageReader) -> Batch:
    """Makes a batch of a pack.

    Args:
        pictures: of `reader`, one for each of `row.image_ids`; or one blank picture for a row that has none.

    Returns:
        A Batch. labels[t] is input_ids[t + 1] where that token is to be predicted and of the same segment, else
        IGNORE_INDEX.

    Raises: InputError where a picture takes another number of tokens than its places in the row.
    """
    return assemble(row, _stacked(row, pictures, reader, "the batch"))


def _stacked(row: PackedRow, pictures: list[np.ndarray], reader: ImageReader, where: str) -> torch.Tensor | ImageInputs:
    """What the reader makes of a row's pictures."""
    counts = row.image_counts.tolist() or [1] * len(pictures)
    pixels = reader.stack(pictures, counts)
    if len(row.image_ids):
        _require_tokens(pixels, row.image_tokens, where)
    return pixels


def _require_tokens(pixels: torch.Tensor | ImageInputs, expected: np.ndarray, where: str) -> None:
    """Raises InputError where images take other numbers of tokens than the text has places for."""
    if isinstance(pixels, ImageInputs) and (found := listed(pixels.tokens)[: len(expected)]) != expected.tolist():
        raise InputError(
            f"{where}: its images take {found} tokens, but were tokenised with {expected.tolist()}: the processor "
            "makes something else of them now; pack the samples again"
        )


def batch_of(
    segments: Sequence[Segment], pictures: Mapping[str, np.ndarray], reader: ImageReader, blank: bool = False
) -> Batch:
    """A batch of tokenised samples that come from no shard.

    Args:
        pictures: of `reader` by name, those that the segments show.
        blank: give the batch a blank picture if they show none.
    """
    names, shown = images_of(segments, reader)
    instructions = [segment.instruction_ids for segment in segments]
    has_instruction = any(map(len, instructions))
    row = PackedRow(
        input_ids=np.concatenate([segment.input_ids for segment in segments]),
        loss_mask=np.concatenate([segment.loss_mask for segment in segments]),
        segment_lengths=np.array([len(segment.input_ids) for segment in segments], np.int32),
        image_ids=np.arange(len(names), dtype=np.int64),
        sample_ids=tuple(segment.sample_id for segment in segments),
        instruction_ids=np.concatenate(instructions),
        instruction_lengths=np.array([len(ids) for ids in instructions] if has_instruction else [], np.int32),
        position_ids=np.concatenate([segment.position_ids for segment in segments], axis=1),
        blocks=np.concatenate([segment.blocks for segment in segments]),
        **shown,
    )
    return collate(row, [reader.blank()] if blank and not names else [pictures[name] for name in names], reader)


def images_of(segments: Sequence[Segment], reader: ImageReader) -> tuple[list[str], dict[str, np.ndarray]]:
    """(names of the distinct images that segments show, `image_slots`, `image_tokens` and `image_counts` of a
    `PackedRow` that shows them). Where it matters whether an image stands alone in its sample (count 1) or not (2), it
    comes once for each, those that do first."""
    runs = [
        (min(len(segment.images), 2) if reader.counts_matter else 1, name)
        for segment in segments
        for name in segment.images
    ]
    distinct = sorted(dict.fromkeys(runs), key=lambda run: run[0])  # stable: else in the order of the runs
    places = {run: place for place, run in enumerate(distinct)}
    of_runs = [tokens for segment in segments for tokens in segment.image_tokens.tolist()]
    tokens = dict(zip(runs, of_runs))
    arrays = {
        "image_slots": [places[run] for run in runs],
        "image_tokens": [tokens[run] for run in distinct if run in tokens],
        "image_counts": [count for count, _ in distinct],
    }
    return [name for _, name in distinct], {name: np.array(values, np.int32) for name, values in arrays.items()}


def pixels_of(
    segments: Sequence[Segment], pictures: Mapping[str, np.ndarray], reader: ImageReader
) -> tuple[torch.Tensor | ImageInputs, torch.Tensor]:
    """(what a model is given of the segments' distinct images, int64 [K] which of them stands at each image run)."""
    names, shown = images_of(segments, reader)
    pixels = reader.stack([pictures[name] for name in names], shown["image_counts"].tolist())
    _require_tokens(pixels, shown["image_tokens"], f"sample '{segments[0].sample_id}'" if segments else "no sample")
    return pixels, tensor_of(shown["image_slots"].astype(np.int64))


def assemble(row: PackedRow, pixels: Shown) -> Batch:
    """See `collate`. pixels: what the model is given of the row's images."""
    # A stock model's may be one more than the row shows, see `StockReader.stack`.
    more = len(pixels) - len(row.image_ids)
    assert more == 0 or (more == 1 and (len(row.image_ids) == 0 or isinstance(pixels, ImageInputs))), more
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
        position_ids=_positions(row, np.arange(len(input_ids)) - np.repeat(starts, lengths)),
        segment_lengths=tensor_of(lengths),
        label_lengths=tensor_of(np.add.reduceat(row.loss_mask, starts, dtype=np.int64)),
        pixels=pixels,
        image_slots=tensor_of(row.image_slots.astype(np.int64)),
        instruction_ids=_padded(row.instruction_ids, row.instruction_lengths, len(lengths)),
        sample_ids=row.sample_ids,
        num_label_tokens=num_label_tokens,
        blocks=tensor_of(row.blocks.astype(np.int64)),
    )


def _positions(row: PackedRow, counted: np.ndarray) -> torch.Tensor:
    """int64 [T] or, of a model whose forward takes several rows, [R, T]. `counted`: from 0, by segment."""
    if len(row.position_ids) == 0:
        return tensor_of(counted)
    stored = row.position_ids.astype(np.int64)
    return tensor_of(stored[0] if len(stored) == 1 else stored)


def _padded(ids: np.ndarray, lengths: np.ndarray, num_rows: int) -> torch.Tensor:
    """Rows one after another -> int64 [num_rows, longest], -1 behind each; [num_rows, 0] where there is none."""
    if len(lengths) == 0:
        return torch.empty(num_rows, 0, dtype=torch.int64)
    rows = np.full((num_rows, int(lengths.max())), -1, np.int64)
    rows[np.arange(rows.shape[1]) < lengths[:, None]] = ids
    return tensor_of(rows)


def filler(image: bool, reader: ImageReader, kept: KeptImages | None = None) -> Batch:
    """A batch of two tokens and no label for a rank without a pack; with `image`, one blank picture that no slot refers
    to, or of `kept` the features of some image."""
    row = reader.filler_row(image)
    if kept is None:
        batch = collate(row, [reader.blank()] if image else [], reader)
    else:
        batch = assemble(row, kept.of_row(row, blank=image, where="a filler"))
    batch.is_filler = True
    return batch


Fetched: TypeAlias = tuple[PackedRow, Shown] | str
"""A row and what the model is given of its images, or an error's text."""


class _Fetcher(Dataset[Fetched]):
    """Runs in workers, on (pack number, whether the micro-step has images)."""

    def __init__(self, dataset: PackedDataset, reader: ImageReader, kept: KeptImages | None) -> None:
        self._dataset, self._reader, self.kept = dataset, reader, kept

    def __getitem__(self, item: tuple[int, bool]) -> Fetched:
        # An exception would come out of the DataLoader with the worker's traceback in its message.
        try:
            return self.fetch(*item)
        except InputError as error:
            return str(error)
        except (OSError, MemoryError) as error:
            return (
                f"{self._dataset.place}: pack {item[0]} cannot be read ({type(error).__name__}: {error}); look at "
                "this file system and at the host's memory"
            )

    def fetch(self, number: int, has_images: bool) -> tuple[PackedRow, Shown]:
        """Raises: InputError, or OSError, if the pack or an image cannot be read."""
        row = self._dataset.row(number)
        samples = f"pack {number} (samples {', '.join(row.sample_ids[:3])} ...)"
        if self.kept is not None:
            where = f"{self._dataset.place}: {samples}"
            return row, _shared(self.kept.of_row(row, blank=has_images, where=where))
        pictures = [
            self._reader.decode(self._dataset.image(image_id), f"{self._dataset.place}: image {image_id} of {samples}")
            for image_id in row.image_ids.tolist()
        ]
        if has_images and not pictures:
            pictures = [self._reader.blank()]
        return row, _shared(_stacked(row, pictures, self._reader, f"{self._dataset.place}: {samples}"))


def _shared(pixels: Shown) -> Shown:
    """The same, in a worker in memory that it shares with the trainer.

    Shared here and not, as the queue would, in its thread on the way out: that tells nobody if it fails, and the
    trainer waits for ever.

    Raises: InputError if there is no room for it.
    """
    if isinstance(pixels, ImageInputs):
        tensors = [pixels.tokens, *pixels.tensors.values()]
    else:
        tensors = [pixels.lengths, pixels.rows] if isinstance(pixels, ImageFeatures) else [pixels]
    if get_worker_info() is None:
        return pixels
    num_bytes = sum(tensor.nbytes for tensor in tensors)
    try:
        for tensor in tensors:
            if tensor.nbytes:
                tensor.share_memory_()
    except (RuntimeError, OSError) as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0].strip()
        raise InputError(
            f"an image worker could not share {num_bytes / 2**20:.1f} MiB with the trainer "
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
        reader: ImageReader,
        workers: int,
        start_step: int = 0,
        pin_memory: bool = False,
        kept: KeptImages | None = None,
    ) -> None:
        """Args:
        reader: makes of the images what the model is given.
        workers: processes that decode; 0 decodes in this one.
        pin_memory: give batches in pinned memory, so that nothing waits for their copy to a GPU but the work that reads
        them.
        kept: features that are read in the images' place; None: images are decoded.
        """
        self.while_waiting: Callable[[], None] = lambda: None
        """Called every POLL_SECONDS while the workers let us wait. Bounds the wait, if anything does: it may raise."""
        self._plan, self._rank, self.reader, self._start_step = plan, rank, reader, start_step
        self._pin_memory, self._packs = pin_memory, _PlanSampler(plan, rank, start_step)
        self.kept, self.dataset = kept, dataset
        self._loader: DataLoader[Fetched] | None = DataLoader(
            _Fetcher(dataset, reader, kept),
            sampler=self._packs,
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

    def _start(self) -> Iterator[Fetched]:
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
        with self.dataset.fetched_ahead(pack for pack, _ in self._packs) as used:
            for number in range(self._start_step, self._plan.num_steps):
                step = self._plan.step(number)
                batches = [
                    filler(has_images, self.reader, self.kept) if pack == FILLER else self._unwrap(fetched)
                    for pack, has_images in _share(step, self._rank)
                ]
                used(int((step.packs[:, self._rank] != FILLER).sum()))
                if self._pin_memory:
                    batches = [batch.pin_memory() for batch in batches]
                yield LoadedStep(step=number, batches=batches, plan=step)

    def _unwrap(self, fetched: Iterator[Fetched]) -> Batch:
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
            raise InputError(f"an image worker was killed ({detail}, out of memory?); lower data.workers") from None
        if isinstance(found, str):
            raise InputError(found)
        return assemble(*found)


def load_pack(
    dataset: PackedDataset, number: int, reader: ImageReader, kept: KeptImages | None, has_images: bool | None = None
) -> Batch:
    """One pack, loaded here; InputError or OSError if it cannot be read. Arguments as of `StepLoader`; has_images: of
    its micro-step, see `StepPlan`; None: it is alone in it."""
    shown = bool(dataset.index.num_images[number]) if has_images is None else has_images
    return assemble(*_Fetcher(dataset, reader, kept).fetch(number, shown))


def _begin_worker(_: int) -> None:
    end_with_parent()
    torch.set_num_threads(1)
