"""Frozen weights in 4 and 8 bits: products beside those of the dequantised weights, by the path that this device takes,
and whole runs."""

from __future__ import annotations

import sys

import torch
from torch import nn

from tests.gpu.part import Findings, relative_error, run_part
from tests.gpu.runs import finish, losses
from vltrain.models.quantise import Int8Linear, Nf4Linear

SIZES = ((128, 128), (192, 64), (96, 96), (4096, 4096), (4096, 11008), (11008, 4096))
KINDS = {
    4: (Nf4Linear, 1e-3),
    8: (Int8Linear, 1e-2),
}  # how far a product in bf16 may be from that of the dequantised weights in bf16
STEPS = 12


def find(findings: Findings) -> None:
    torch.manual_seed(0)
    for bits, (kind, limit) in KINDS.items():
        for inputs, outputs in SIZES[:2] if findings.emulate else SIZES:
            findings.attempt(
                f"{bits} bits, {inputs} x {outputs}", lambda: _product(findings, bits, kind, limit, inputs, outputs)
            )
    if findings.emulate:
        return
    runs = {}
    for bits in (16, 4, 8):
        run = findings.folder / f"bits{bits}"
        words = [
            "--ds",
            "ds_configs/zero2.json",
            "--bits",
            str(bits),
            "--train.max_steps",
            str(STEPS),
            "--train.eval_every_steps",
            "0",
            "--eval.max_samples",
            "100",
            "--output",
            str(run),
        ]
        findings.attempt(f"a run in {bits} bits", lambda: finish(words, findings.folder / f"bits{bits}.log"))
        runs[bits] = losses(run)
    for bits in (4, 8):
        for step in (0, STEPS - 1):
            if len(runs[bits]) == len(runs[16]) == STEPS:
                difference = abs(runs[bits][step] / runs[16][step] - 1)
                findings.check(
                    "losses of the quickstart beside 16 bits'",
                    difference,
                    0.05,
                    bits=bits,
                    step=step,
                    loss=runs[bits][step],
                )


def _product(findings: Findings, bits: int, kind: type, limit: float, inputs: int, outputs: int) -> None:
    linear = nn.Linear(inputs, outputs, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.normal_(std=inputs**-0.5)
    packed = kind(linear).to(findings.device)
    dense = packed.dequantised(torch.bfloat16)
    x = torch.randn(70, inputs, device=findings.device, dtype=torch.bfloat16)
    found = packed.packed_product(x, packed.bias)
    findings.check(
        "products",
        relative_error(found, x.float() @ dense.float().t() + packed.bias.float()),
        max(limit, 4e-3),
        bits=bits,
        size=f"{inputs} x {outputs}",
        of="forward",
    )
    states = x.clone().requires_grad_()
    upstream = torch.randn(70, outputs, device=findings.device, dtype=torch.bfloat16)
    packed(states).backward(upstream)
    findings.check(
        "products",
        relative_error(states.grad, upstream.float() @ dense.float()),
        max(limit, 4e-3),
        bits=bits,
        size=f"{inputs} x {outputs}",
        of="gradient of the input",
    )


if __name__ == "__main__":
    sys.exit(run_part("bits", find, __doc__))
