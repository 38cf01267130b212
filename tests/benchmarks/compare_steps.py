"""Training steps of the checkout that this process runs in, one for each line on stdin; a program of
tests.benchmarks.compare, which runs it in the worktrees of two commits.

    python -P compare_steps.py FOLDER WHAT PRECISION QUICK

It asks little of a commit: `vltrain`, and `tests.benchmarks.ours` and `.samples` with what is called here. Answers are
lines of JSON on stdout; all else goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

PACK_LENGTH = 1280
NUM_SAMPLES = 200
# By what is trained on: the share of samples with an image; None: ScienceQA's.
WHAT: dict[str, float | None] = {"train": None, "train_text": 0.0}


def prepare(folder: Path, what: str, precision: str, quick: bool) -> Any:
    """The commit's own trainer on packs that are the same for all commits."""
    import vltrain

    here = Path(vltrain.__file__).resolve().parents[1]
    if here != Path.cwd().resolve():
        raise SystemExit(f"it would train the vltrain of {here} instead of its own")
    from tests.benchmarks.ours import DTYPES, OurSteps, benchmark_config, our_trainer, sizes
    from tests.benchmarks.samples import pack_samples, scienceqa_like

    config = benchmark_config(
        quick,
        train__precision=precision,
        data__pack_length=PACK_LENGTH,
        data__workers=0,
        output=str(folder / "run"),
    )
    vocabulary, visual_tokens = sizes(config, quick)
    share = WHAT[what]
    samples = scienceqa_like(
        24 if quick else NUM_SAMPLES,
        vocabulary=vocabulary,
        visual_tokens=visual_tokens,
        **({} if share is None else {"image_share": share}),
    )
    dataset = pack_samples(samples, PACK_LENGTH, folder / "packs", visual_tokens)
    return OurSteps(our_trainer(config, dataset, DTYPES[precision], ds={"zero_optimization": {"stage": 0}}))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints: to stderr
    folder, what, precision, quick = sys.argv[1:]
    import torch

    from vltrain.train.zero.engine import init_distributed, shutdown_distributed

    init_distributed()
    ours = prepare(Path(folder), what, precision, quick == "1")
    print(json.dumps({"threads": torch.get_num_threads()}), file=answers, flush=True)
    for _ in sys.stdin:
        start, start_cpu = time.perf_counter(), time.process_time()
        tokens = int(ours.step())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found = {"tokens": tokens, "seconds": time.perf_counter() - start, "cpu": time.process_time() - start_cpu}
        print(json.dumps(found), file=answers, flush=True)
    ours.trainer.monitor.close()
    shutdown_distributed()


if __name__ == "__main__":
    main()
