"""The 7B recipe at full size, its weights drawn on the device: 16 steps. Tokens a second, utilisation, and peak memory
beside `vltrain plan`'s.

Packs have ScienceQA's lengths and images. Emulated, only the plan and the packs are made.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.ours import OurSteps
from tests.benchmarks.samples import pack_samples, scienceqa_like
from tests.gpu.part import Findings, run_items
from tests.gpu.runs import losses
from tests.gpu.weights import drawn_on_device
from vltrain.config.command_line import Settings, load_settings
from vltrain.config.recipe import build_config, read_recipe
from vltrain.config.schema import Config
from vltrain.data.shards import PackedDataset
from vltrain.distributed.hardware import peak_flops
from vltrain.memory.plan import GIB
from vltrain.memory.sizes import assume_sizes
from vltrain.models.build import build_model
from vltrain.models.compiled import compile_blocks
from vltrain.programs.plan import OPTIONS, plan_recipe
from vltrain.train.determinism import set_determinism
from vltrain.train.make_trainer import RunStart, make_trainer
from vltrain.train.zero.ds_config import load_ds_json
from vltrain.train.zero.engine import init_distributed, shutdown_distributed

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "launch" / "recipes" / "llama2_7b_diht_scienceqa.yaml"
DS = ROOT / "ds_configs" / "zero2.json"
VOCABULARY, VISUAL_TOKENS, SAMPLES = 32000, 6, 400
WARM_UP, STEPS = 3, 16
LONG = {"data.pack_length": 10240, "train.packs_per_step": 1}  # the same samples a step, in one row
KEPT = {"train.activation_checkpointing": False}
FLASH = "flash_attention_2"
VARIANTS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "one_pack": LONG,
    "nothing_recomputed": {**LONG, **KEPT},
    "recipe_nothing_recomputed": KEPT,
    "recipe_compiled": {**KEPT, "train.compile": True},
    "compiled": {**LONG, **KEPT, "train.compile": True},
    "not_deterministic": {**LONG, "train.deterministic": False},
    "bits_4": {**LONG, "model.bits": 4},
    "flash_attention_2": {**LONG, **KEPT, "model.llm.attention": FLASH},
}
EMULATED = ("recipe", "one_pack")


def find(findings: Findings, variant: str) -> None:
    changes = VARIANTS[variant]
    samples = scienceqa_like(60 if findings.emulate else SAMPLES, vocabulary=VOCABULARY, visual_tokens=VISUAL_TOKENS)
    dataset = pack_samples(samples, changes.get("data.pack_length", 2560), findings.folder / "packs", VISUAL_TOKENS)
    planned = _plan(str(dataset.folder), changes)
    if findings.emulate:
        findings.row("planned", variant=variant, peak_gib=planned)
        return
    if variant == FLASH and find_spec("flash_attn") is None:
        findings.row("not run", variant=variant, reason="flash-attn is not installed")
        return
    init_distributed()
    _train(findings, variant, dataset, planned)
    shutdown_distributed()


def _train(findings: Findings, variant: str, dataset: PackedDataset, planned: float) -> None:
    config = _config(VARIANTS[variant], findings.folder / "run", dataset)
    set_determinism(config.train.deterministic)
    with drawn_on_device():
        model = build_model(
            config.model,
            dtype=torch.bfloat16,
            activation_checkpointing=config.train.activation_checkpointing,
            device="cuda",
        )
    if config.train.compile:
        compile_blocks(model)
    torch.cuda.reset_peak_memory_stats()
    trainer = make_trainer(
        config,
        load_ds_json(DS),
        model=model,
        dataset=dataset,
        start=RunStart(dtype=torch.bfloat16),
        evaluate=lambda _: None,
    )
    ours = OurSteps(trainer)
    for _ in range(WARM_UP):
        ours.step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    tokens = sum(ours.step() for _ in range(STEPS))
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    flops = sum(ours.flops(WARM_UP + step) for step in range(STEPS))
    peak = torch.cuda.max_memory_allocated() / GIB
    trainer.monitor.pause()  # which flushes the log
    findings.row(
        f"{STEPS} steps of the 7B recipe",
        variant=variant,
        seconds_a_step=seconds / STEPS,
        tokens_per_second=tokens / seconds,
        mfu=flops / seconds / peak_flops(torch.bfloat16),
        peak_allocated_gib=peak,
        peak_reserved_gib=torch.cuda.max_memory_reserved() / GIB,
        planned_gib=planned,
        loss=losses(Path(config.output))[-1],
    )
    findings.require(peak <= planned, f"{variant}: peak {peak:.2f} GiB, vltrain plan says {planned:.2f} GiB at most")
    trainer.monitor.close()
    trainer.loader.close()


def _config(changes: dict[str, Any], output: Path, dataset: PackedDataset) -> Config:
    settings = {
        **read_recipe(RECIPE),
        "output": str(output),
        "data.train_packs": str(dataset.folder),
        "data.workers": 4,
        "train.log_every_steps": 5,
        "train.save_every_steps": 10**9,
        "train.packs_per_step": 4,
        "train.epochs": 1000.0,
        **changes,
    }
    config = build_config(settings)
    model, _ = assume_sizes(config.model, llm="llama-2-7b", vision="vit-l/14-336")
    output.mkdir(parents=True, exist_ok=True)
    return replace(config, model=model)


def _plan(packs: str, changes: dict[str, Any]) -> float:
    """GiB that `vltrain plan` says for one GPU, with the packs of that folder."""
    words = [
        word
        for key, value in changes.items()
        for word in (f"--{key}", str(value).lower() if isinstance(value, bool) else str(value))
    ]
    given = [
        "--recipe",
        str(RECIPE),
        "--ds",
        str(DS),
        "--data.train_packs",
        packs,
        "--llm-size",
        "llama-2-7b",
        "--vision-size",
        "vit-l/14-336",
    ]
    settings: Settings = load_settings([*given, *words], program="vltrain plan", description="", options=OPTIONS)
    return plan_recipe(settings)["memory_per_rank"]["peak_gib"]


if __name__ == "__main__":
    chosen = EMULATED if "--emulate" in sys.argv else tuple(VARIANTS)
    sys.exit(run_items("seven_b", chosen, find, __doc__))
