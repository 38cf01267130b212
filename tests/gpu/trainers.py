"""Our trainer beside transformers' Trainer and TRL's packing on this device, in bf16: SmolLM2-135M and a LLaMA of 1.1B,
random weights, adapters tuned.

How long a step takes does not depend on the weights' values. Batches are as large as feeds a GPU: packs of PACK_LENGTH
tokens, and padded batches of about as many useful ones. Ratios are medians over runs by turns.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from typing import Any

import torch

from tests.benchmarks.measure import alternate, median_ratio, timed
from tests.benchmarks.ours import OurSteps, benchmark_config, our_trainer
from tests.benchmarks.peers import Held, padding_trainer, trl_trainer
from tests.benchmarks.samples import pack_samples, scienceqa_like
from tests.gpu.part import Findings, run_items
from tests.gpu.weights import drawn_on_device
from vltrain.config.schema import Config
from vltrain.distributed.hardware import peak_flops
from vltrain.memory.sizes import assume_sizes
from vltrain.train.determinism import set_determinism
from vltrain.train.zero.engine import init_distributed, shutdown_distributed

PACK_LENGTH, SAMPLES, RUNS, WARM_UP = 8192, 1200, 7, 3
MODELS = {"SmolLM2-135M": "smollm2-135m", "LLaMA-1.1B": "tinyllama-1.1b"}
VOCABULARY, VISUAL_TOKENS = 32000, 4
BATCH = 30  # of ScienceQA's lengths, 8,000 useful tokens
DS = {"zero_optimization": {"stage": 0}}
COMPETITORS = {
    "Trainer, padded to the longest": {"batch_size": BATCH, "length": None},
    "Trainer, padded to 512": {"batch_size": BATCH, "length": 512},
}


def find(findings: Findings, item: str) -> None:
    name, data = item.rsplit("-", 1)
    set_determinism(False)  # which the others do not offer
    init_distributed()
    with drawn_on_device():
        _measure(findings, name, MODELS[name], data)
    shutdown_distributed()


def _config(size: str, output: str) -> Config:
    config = benchmark_config(
        False, train__precision="bf16", data__pack_length=PACK_LENGTH, data__workers=4, output=output
    )
    sized, _ = assume_sizes(
        replace(config.model, llm=replace(config.model.llm, source=size, tokenizer="none")), llm=size
    )
    return replace(config, model=sized)


def _measure(findings: Findings, name: str, size: str, data: str) -> None:
    folder = findings.folder
    config = _config(size, str(folder / "run"))
    share = {"image_share": 0.0} if data == "text" else {}
    samples = scienceqa_like(SAMPLES, vocabulary=VOCABULARY, visual_tokens=VISUAL_TOKENS, **share)
    dataset = pack_samples(samples, PACK_LENGTH, folder / "packs", VISUAL_TOKENS)
    ours = OurSteps(our_trainer(config, dataset, torch.bfloat16, ds=DS))
    compiled = replace(config, train=replace(config.train, compile=True), output=str(folder / "compiled"))
    competitors: dict[str, Any] = {
        "ours": ours,
        "ours, compiled": OurSteps(our_trainer(compiled, dataset, torch.bfloat16, ds=DS)),
    }
    if data == "text":
        competitors["TRL, packing"] = trl_trainer(
            config, samples, torch.bfloat16, pack_length=PACK_LENGTH, folder=folder
        )
    else:
        for title, how in COMPETITORS.items():
            competitors[title] = padding_trainer(config, samples, torch.bfloat16, folder=folder, **how)
    results = alternate({title: timed(one.step) for title, one in competitors.items()}, RUNS, WARM_UP)
    speeds = {title: [tokens / seconds for tokens, seconds in results[title]] for title in competitors}
    flops = statistics.median(ours.flops(WARM_UP + run) / seconds for run, (_, seconds) in enumerate(results["ours"]))
    for title in competitors:
        findings.row(
            "trainers",
            model=name,
            data=data,
            trainer=title,
            useful_tokens_per_second=statistics.median(speeds[title]),
            ours_is_faster_by=median_ratio(speeds["ours"], speeds[title]),
            mfu=flops / peak_flops(torch.bfloat16) if title == "ours" else "",
        )
    for one in competitors.values():
        one.stop() if isinstance(one, Held) else one.trainer.monitor.close()


if __name__ == "__main__":
    sys.exit(
        run_items("trainers", [f"{name}-{data}" for name in MODELS for data in ("scienceqa", "text")], find, __doc__)
    )
