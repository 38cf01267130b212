"""A drawn JPEG of 24 megapixels, looked through while preparing and read for a model, at its own size and at the
reduced one that is used: CPU seconds, and the most memory of the process above what it had before.

    python -m tests.benchmarks.large_images [--runs 5] [--json OUT] [--quick]

Each has a process of its own each time, by turns. The picture is as fine as a photo (noise over gradients), since how
long a JPEG takes follows its bytes.
"""

from __future__ import annotations

import io
import multiprocessing
import statistics
import time
from typing import Any

import numpy as np
from PIL import Image

from tests.benchmarks.measure import alternate, command, median_ratio, report, settled

MOST = 50_000_000
MiB = 1 << 20
EDGE = 336  # of the square that a ViT reads
CASES = {
    "check, own size": ("check", False), "check, reduced": ("check", True), "square, own size": ("square", False),
    "square, reduced": ("square", True),
}  # fmt: skip


def drawn(width: int, height: int, *, progressive: bool = False) -> bytes:
    """A JPEG of quality 90."""
    across, down = np.meshgrid(np.linspace(0, 255, width, dtype=np.float32), np.linspace(0, 255, height))
    noise = np.random.default_rng(0).normal(0, 12, (height, width)).astype(np.float32)
    values = np.stack([across + noise, down + noise, 255 - across + noise], axis=2)
    stream = io.BytesIO()
    picture = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    picture.save(stream, "JPEG", quality=90, progressive=progressive)
    return stream.getvalue()


def _peak_kib() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


def _measured(data: bytes, kind: str, reduced: bool, answers: Any) -> None:
    from vltrain.data.images import decode_image, frame_image, is_dark, open_rgb

    before = _peak_kib()
    start = time.process_time()
    if kind == "check":
        is_dark(data, MOST, "it") if reduced else open_rgb(data, MOST, "it").getextrema()
    elif reduced:
        decode_image(data, EDGE, MOST, "it")
    else:
        frame_image(open_rgb(data, MOST, "it"), EDGE, MOST, "it")
    answers.put((time.process_time() - start, (_peak_kib() - before) * 1024 / MiB))


def run(data: bytes, kind: str, reduced: bool) -> tuple[float, float]:
    """(CPU seconds, MiB)"""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=_measured, args=(data, kind, reduced, answers))
    process.start()
    found = answers.get()
    process.join()
    return found


def main() -> None:
    given = settled(command(__doc__).parse_args())
    size = (600, 400) if given.quick else (6000, 4000)
    rows: list[dict[str, Any]] = []
    for form in ("baseline", "progressive"):
        data = drawn(*size, progressive=form == "progressive")
        calls = {name: lambda case=case: run(data, *case) for name, case in CASES.items()}
        found = alternate(calls, given.runs)
        for what in ("check", "square"):
            own, reduced = found[f"{what}, own size"], found[f"{what}, reduced"]
            rows.append({
                "JPEG": f"{form}, {len(data) / MiB:.1f} MiB", "for": what,
                "s, own size": statistics.median(one for one, _ in own),
                "s, reduced": statistics.median(one for one, _ in reduced),
                "times faster": median_ratio([one for one, _ in own], [one for one, _ in reduced]),
                "MiB, own size": statistics.median(one for _, one in own),
                "MiB, reduced": statistics.median(one for _, one in reduced),
            })  # fmt: skip
    report({"large images": rows}, given)


if __name__ == "__main__":
    main()
