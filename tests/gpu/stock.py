"""Vision-language models of transformers, tiny, on this device: packed rows beside transformers' own eager forward of
each sample alone on the CPU, and real DeepSpeed at ZeRO 0 to 3 in fp32 and bf16 beside a plain loop there."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from safetensors.torch import load_file

from tests.gpu.part import Findings, relative_error, run_items
from tests.models.test_stock import PIECES, alone, plain_of, shaken
from tests.support.processes import run_ranks
from tests.support.stock import CONFIGS, row_of, tiny
from tests.train.plain_loop import relative_difference
from tests.train.zero.test_equivalence import stage
from tests.train.zero.test_stock_equivalence import ADAPTERS, KINDS, plain_run
from vltrain.config.model.mmt import AdapterConfig
from vltrain.distributed.hardware import choose_dtype
from vltrain.errors import InputError
from vltrain.models.build import build_model

UPDATES = {"adapter.vision": "none", "adapter.llm": "none", "stock.llm.peft.kind": "lora"}
TRAINED: dict[str, dict[str, Any]] = {
    **KINDS,
    "gemma3": ADAPTERS,
    "qwen2_5_vl": {**UPDATES, "stock.vision.peft.kind": "lora"},
    "qwen3_5": UPDATES,
}
STAGES = (0, 2, 3)
ATTENTIONS = ("sdpa", "varlen", "flash_attention_2")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKED_LIMITS = {"fp32": 1e-4, "bf16": 5e-2}  # of losses and of the worst gradient's norm
LOSS_LIMITS = {"fp32": 1e-4, "bf16": 2e-2}
STAGES_LIMIT = 1e-4  # between stages
EMULATED = ("smolvlm", "gemma3")


def find(findings: Findings, family: str) -> None:
    for precision in ("fp32",) if findings.emulate else PRECISIONS:
        for attention in ("sdpa",) if findings.emulate else ATTENTIONS:
            what = f"{family}, packed, {attention}, {precision}"
            findings.attempt(what, lambda: _packed(findings, family, attention, precision))
    if family in TRAINED:
        findings.attempt(f"{family}, trained", lambda: _trained(findings, family))


def _model(family: str, dtype: torch.dtype, findings: Findings, attention: str) -> Any:
    section = tiny(family, tune="full", adapter=AdapterConfig(vision="none", llm="none"), attention=attention)
    model = build_model(section, dtype=dtype, runs_on=findings.device)
    shaken(model)
    return model


def _packed(findings: Findings, family: str, attention: str, precision: str) -> None:
    dtype = choose_dtype(precision)
    try:
        model = _model(family, dtype, findings, attention)
    except InputError as error:
        findings.row("attention that is not run", family=family, attention=attention, precision=precision,
                     reason=str(error)[:160])  # fmt: skip
        return
    plain = plain_of(_model(family, torch.float32, findings, "sdpa"))
    row, core = row_of(family, model.parts.core, PIECES), model.parts.core
    pieces = [row_of(family, core, [piece], seed=place) for place, piece in enumerate(PIECES)]
    expected = torch.stack([alone(family, plain, piece) for piece in pieces])
    expected.sum().backward()
    model.to(findings.device)
    with torch.autocast(findings.device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32):
        found = model(row.to(findings.device))
    found.loss_sum.backward()
    worst, name = 0.0, ""
    due = {name: one.grad for name, one in plain.named_parameters() if one.grad is not None}
    # Small ones carry the rounding of all, and a key's bias, whose gradient is zero, nothing else.
    least = max(float(one.norm()) for one in due.values()) / (1000 if dtype == torch.float32 else 100)
    for own, parameter in model.network.named_parameters():
        if own in due:
            assert parameter.grad is not None, f"{own}: no gradient"
            off = float((parameter.grad.cpu().double() - due[own].double()).norm()) / max(float(due[own].norm()), least)
            worst, name = max((worst, name), (off, own))
    error = max(relative_error(found.segment_losses, expected), worst)
    findings.check(
        "packed on this device, beside transformers' own forward of each sample alone on the CPU in fp32",
        error,
        PACKED_LIMITS[precision],
        family=family,
        attention=attention,
        precision=precision,
        losses=relative_error(found.segment_losses, expected),
        worst_gradient=worst,
        of=name,
    )


def _trained(findings: Findings, family: str) -> None:
    plain = plain_run(family, TRAINED[family])
    folder = findings.folder / "runs"
    folder.mkdir(exist_ok=True)
    told = [
        {
            "family": family,
            "changes": TRAINED[family],
            "ds": stage(number),
            "output": str(folder / f"{precision}-{number}"),
            "checkpointing": number == 3,
            "precision": precision,
        }
        for precision in (("fp32",) if findings.emulate else PRECISIONS) for number in STAGES
    ]  # fmt: skip
    file = folder / "scenarios.json"
    file.write_text(json.dumps(told))
    run_ranks("tests.train.zero.stock_worker", [str(file)], 1, folder / "log", timeout_seconds=500)
    first: dict[str, torch.Tensor] = {}
    for one in told:
        precision, number = one["precision"], one["ds"]["zero_optimization"]["stage"]
        losses = load_file(f"{one['output']}.safetensors")["losses"]
        zero = first.setdefault(precision, losses)
        between = relative_difference(losses, zero)
        findings.check(
            "losses of 12 steps beside the plain loop's on the CPU in fp32",
            relative_difference(losses, plain["losses"]),
            LOSS_LIMITS[precision],
            family=family,
            precision=precision,
            stage=number,
            last_loss=float(losses[-1]),
            as_zero_0="bit for bit" if torch.equal(losses, zero) else f"to {between:.1e}",
        )
        findings.require(between <= STAGES_LIMIT, f"{family} in {precision}: ZeRO {number} differs from ZeRO 0")


if __name__ == "__main__":
    chosen = EMULATED if "--emulate" in sys.argv else tuple(CONFIGS)
    sys.exit(run_items("stock", chosen, find, __doc__))
