"""Makes the features that a frozen image part gives for every image of the packs, once (`train.keep_image_features`).

    missing parts of the store -> ranks take one each -> chunks of images, decoded ahead -> forward -> written -> ...

Ranks do as many forwards as the busiest of them in each round, since ZeRO-3 gathers weights in all of them at once. The
first chunk is computed with a graph, which must not come about, and once more, which must give the same bits: features
that dropout or a trained weight had a part in cannot be kept. A store that was made before is compared with the first
chunk's features of now.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import PIL
import torch
import torch.distributed as dist
import transformers

from vltrain.batch import ImageFeatures, ImageInputs
from vltrain.config.schema import Config
from vltrain.data.kept.store import MANIFEST, Entries, FeatureStore, KeptImages, entries_of
from vltrain.data.pictures import ImageReader
from vltrain.data.shards import PackedDataset
from vltrain.distributed.broadcast import from_rank_0
from vltrain.errors import InputError
from vltrain.files.lock import lock_beside, one_writer, writer_of
from vltrain.models.compiled import uncompiled
from vltrain.models.interface import ImagePart, VisionLanguageModel
from vltrain.train.zero.engine import Engine, gathered

logger = logging.getLogger(__name__)

POLL_SECONDS, TELL_SECONDS = 10.0, 60.0
SEEN_SECONDS = 120.0  # that a finished folder may take to be seen on another node
LARGEST_DIFFERENCE = 1e-2  # relative, between machines and their libraries: bf16's rounding through a tower


def kept_images(
    config: Config, engine: Engine, dataset: PackedDataset, reader: ImageReader, part: ImagePart | None
) -> KeptImages | None:
    """See `FeatureMaker.kept`; None without an image part whose features are to be kept."""
    if part is None:
        return None
    return FeatureMaker(config=config, engine=engine, dataset=dataset, reader=reader, part=part).kept()


@dataclass(kw_only=True)
class FeatureMaker:
    """Makes and opens the features of a run's packs. part: of `VisionLanguageModel.image_part`."""

    config: Config
    engine: Engine
    dataset: PackedDataset
    reader: ImageReader
    part: ImagePart

    def kept(self) -> KeptImages:
        """The features, made first where they are missing. A collective.

        Raises: InputError for an image that cannot be read, a disk without room, a store that is damaged, and features
        that are not the same each time.
        """
        store = FeatureStore(self.dataset.folder, self._facts())
        was_there = from_rank_0(store.is_complete)
        if not was_there:
            with _only_maker(store):
                was_there = from_rank_0(store.is_complete)
                if not was_there:
                    self._make(store)
        _wait_for(store)
        kept = store.open(verify=int(os.environ.get("LOCAL_RANK", "0")) == 0)
        if was_there:
            self._compare(kept)
        if dist.get_rank() == 0:
            logger.info(
                "image features: of %d images, %.2f GiB in %s; while training no image is read or encoded",
                len(kept),
                kept.num_bytes / 2**30,
                store.folder,
            )
        return kept

    def _facts(self) -> dict[str, Any]:
        device = self.engine.device
        return {
            "packs": self.dataset.manifest.checksum,
            "architecture": self.config.model.architecture,
            "image_part": self.part.facts,
            "weights": from_rank_0(digest_of(self.engine.model, self.part)),
            "reader": self.reader.facts(),
            "precision": self.engine.precision,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "PIL": PIL.__version__},
        }

    def _compute(self, pixels: torch.Tensor | ImageInputs, count: int) -> ImageFeatures:
        """Of the first `count` images."""
        with self.engine.autocast(), uncompiled(self.config):
            made = self.engine.model.image_features(pixels.to(self.engine.device))
        return made.first(count).to("cpu")

    def _pixels(self, entries: Entries, chunk: range) -> torch.Tensor | ImageInputs:
        ids, counts = (values[chunk.start : chunk.stop].tolist() for values in (entries.image_ids, entries.counts))
        where = f"{self.dataset.place}: image"
        return self.reader.stack([self.reader.decode(self.dataset.image(one), f"{where} {one}") for one in ids], counts)

    def _make(self, store: FeatureStore) -> None:
        entries = entries_of(self.dataset)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        missing: list[int] = from_rank_0(store.missing(entries) if rank == 0 else None)
        first = _checked(self._try(entries), entries, entries.chunks(0)[0])
        if rank == 0:
            store.require_room(_num_bytes(entries, missing, first))
            logger.info("image features: %d of %d files to be made", len(missing), entries.num_parts)
        dist.barrier()
        # Not under ZeRO 3, where other ranks' forwards would lack this one's.
        done = {} if self._gathers else {0: first}
        chunks = [chunk for part in missing[rank::world_size] for chunk in entries.chunks(part)]
        pixels = self._decoded(entries, [chunk for chunk in chunks if chunk.start not in done])
        told = time.monotonic()
        for start in range(0, len(missing), world_size):
            at_once = missing[start : start + world_size]
            own = entries.chunks(at_once[rank]) if rank < len(at_once) else []
            made = [
                done.get(chunk.start) or _checked(self._without_graph(next(pixels), chunk), entries, chunk)
                for chunk in own
            ]
            for _ in range(max(len(entries.chunks(part)) for part in at_once) - len(own)) if self._gathers else ():
                self._without_graph(self.reader.stack([self.reader.blank()], [1]), range(1))
            if own:
                store.write(at_once[rank], made)
            dist.barrier()
            if rank == 0 and time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                logger.info("image features: %d of %d files made", start + len(at_once), len(missing))
        if rank == 0:
            store.finish(entries)
        dist.barrier()

    @property
    def _gathers(self) -> bool:
        return self.engine.stage == 3

    def _without_graph(self, pixels: torch.Tensor | ImageInputs, chunk: range) -> ImageFeatures:
        with torch.no_grad():
            return self._compute(pixels, len(chunk))

    def _try(self, entries: Entries) -> ImageFeatures:
        """The first chunk's features, after the checks that they can be kept."""
        [chunk, *_] = entries.chunks(0)
        pixels = self._pixels(entries, chunk)
        with torch.enable_grad():
            first = self._compute(pixels, len(chunk))
        if first.rows.requires_grad:
            raise InputError(
                "train.keep_image_features: the image part's output has a gradient, so something trained is in it; "
                "leave it out"
            )
        again = self._without_graph(pixels, chunk)
        if not torch.equal(first.rows, again.rows):
            raise InputError(
                "train.keep_image_features: the image part gives other features for the same images the second time, "
                "as dropout does; set its dropout to 0, or leave it out"
            )
        return first

    def _compare(self, kept: KeptImages) -> None:
        """Raises InputError where the first chunk's stored features are not what is computed now."""
        entries = entries_of(self.dataset)
        [chunk, *_] = entries.chunks(0)
        now, stored = self._without_graph(self._pixels(entries, chunk), chunk).rows, kept.of(chunk).rows
        if now.shape == stored.shape and now.dtype == stored.dtype and torch.equal(now, stored):
            return
        same_kind = now.shape == stored.shape
        difference = float((now.double() - stored.double()).norm() / now.double().norm()) if same_kind else float("inf")
        if not difference <= LARGEST_DIFFERENCE:
            raise InputError(
                f"{kept.folder}: its features are not those of this image part (relative difference {difference:.1e}); "
                f"remove {kept.folder}, and the next run makes it anew"
            )
        if dist.get_rank() == 0:
            logger.warning(
                "image features: %s was made on another machine: features differ by %.1e (relative)",
                kept.folder,
                difference,
            )

    def _decoded(self, entries: Entries, chunks: list[range]) -> Iterator[torch.Tensor | ImageInputs]:
        """What the model is given of each chunk, in order; decoded ahead by as many threads as `data.workers`."""
        workers = self.config.data.workers
        if workers == 0:
            yield from (self._pixels(entries, chunk) for chunk in chunks)
            return
        with ThreadPoolExecutor(workers) as pool:
            left = iter(chunks)
            ahead = [pool.submit(self._pixels, entries, chunk) for chunk in islice(left, 2 * workers)]
            while ahead:
                yield ahead.pop(0).result()
                ahead += [pool.submit(self._pixels, entries, chunk) for chunk in islice(left, 1)]


def _num_bytes(entries: Entries, missing: list[int], first: ImageFeatures) -> int:
    """Of the parts that are to be made. first: of some images."""
    row = first.rows[:1].nbytes
    ranges = [chunk for part in missing for chunk in entries.chunks(part)]
    if entries.tokens is not None:
        return row * sum(int(entries.tokens[chunk.start : chunk.stop].sum()) for chunk in ranges)
    return row * int(first.lengths[0]) * sum(map(len, ranges))


def _checked(made: ImageFeatures, entries: Entries, chunk: range) -> ImageFeatures:
    """The same, if the images have as many rows as tokens stand for them; else InputError."""
    if entries.tokens is not None and made.lengths.tolist() != entries.tokens[chunk.start : chunk.stop].tolist():
        raise InputError(
            f"image {entries.image_ids[chunk.start]} of the packs and those behind it: the image part makes "
            f"{made.lengths.tolist()} vectors of them, but they were tokenised with "
            f"{entries.tokens[chunk.start : chunk.stop].tolist()}; pack the samples again"
        )
    return made


def digest_of(model: VisionLanguageModel, part: ImagePart) -> str:
    """SHA-256 (hex) of the image part's weights and buffers, on rank 0; elsewhere of nothing. A collective where ZeRO-3
    partitions them."""
    hashed = hashlib.sha256()
    for name, weight in sorted((*model.named_parameters(), *model.named_buffers())):
        if name in part.weights:
            with gathered(weight) if isinstance(weight, torch.nn.Parameter) else nullcontext():
                for tensor in (weight.detach(), *_scales(weight)) if dist.get_rank() == 0 else ():
                    hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                    numbers: Any = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
                    hashed.update(numbers)
    return hashed.hexdigest()


def _scales(weight: Any) -> list[torch.Tensor]:
    """What packed weights of 4 or 8 bits are multiplied by."""
    scales = (getattr(getattr(weight, "quant_state", None), "absmax", None), getattr(weight, "SCB", None))
    return [one for one in scales if one is not None]


@contextmanager
def _only_maker(store: FeatureStore) -> Generator[None]:
    """Holds the store in the block; another run that makes it is waited for. A collective: the other ranks ask rank 0
    again and again, so that no collective waits for long."""
    rank, told = dist.get_rank(), False
    lock = lock_beside(store.folder)
    with ExitStack() as held:
        while True:
            other = writer_of(lock) if rank == 0 else None
            if rank == 0 and other is None:
                held.enter_context(one_writer(lock, store.folder, remedy="wait for it", wait_seconds=TELL_SECONDS))
            if not from_rank_0(other is not None):
                break
            if other is not None and not told:
                told = True
                logger.warning("image features: waiting for %s, which makes %s", other, store.folder)
            time.sleep(POLL_SECONDS)
        yield


def _wait_for(store: FeatureStore) -> None:
    """Of a folder that another node has finished. Raises InputError if it does not come to be seen here."""
    began = time.monotonic()
    while not store.is_complete:
        if time.monotonic() - began > SEEN_SECONDS:
            raise InputError(
                f"{store.folder / MANIFEST}: rank 0 has made it, but rank {dist.get_rank()} does not see it; put the "
                "packs where all nodes see the same files"
            )
        time.sleep(1.0)
