"""`vltrain check recipe` in this rank's process, of one recipe after another. What came of each is written to its
"result", with the rank behind it: the exit code and the lines. With "both", the quick check runs on the trainer before
the full one; with "fault", one is planted. Blocks are compiled without a compiler's code behind it."""

import contextlib
import io
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.gemma3 import modeling_gemma3

from tests.preflight.faults import plant
from vltrain.data.report.finding import Finding
from vltrain.errors import InputError
from vltrain.models.compiled import compile_blocks
from vltrain.preflight.check import check
from vltrain.programs import train
from vltrain.programs.checks import recipe
from vltrain.train.trainer import Trainer
from vltrain.train.zero.engine import shutdown_distributed


def both(trainer: Trainer, *, everything: bool) -> list[Finding]:
    return [*check(trainer, everything=False), *check(trainer, everything=everything)]


def projector_of_released_weights(patch: pytest.MonkeyPatch) -> None:
    """transformers begins Gemma 3's projector with zeros, through which no adapter of the tower gets a gradient: a
    right alarm of a network of random numbers."""
    begin = modeling_gemma3.Gemma3PreTrainedModel._init_weights

    def filled(self: Any, module: torch.nn.Module) -> None:
        begin(self, module)
        if isinstance(module, modeling_gemma3.Gemma3MultiModalProjector):
            torch.nn.init.normal_(module.mm_input_projection_weight, std=0.02)

    patch.setattr(modeling_gemma3.Gemma3PreTrainedModel, "_init_weights", filled)


def run_one(scenario: dict[str, Any]) -> None:
    said, assemble = io.StringIO(), recipe.assemble
    with pytest.MonkeyPatch.context() as patch:
        # Which has tests of its own.
        patch.setitem(recipe.require_runnable.__globals__, "require_audited", lambda model: None)
        if scenario.get("both"):
            patch.setattr(recipe, "check", both)
        projector_of_released_weights(patch)
        patch.setattr(recipe, "shutdown_distributed", lambda: None)  # the next one is of the same group
        patch.setattr(train, "compile_blocks", partial(compile_blocks, backend="aot_eager"))
        fault = scenario.get("fault", "")
        patch.setattr(recipe, "assemble", lambda *given: plant(patch, fault, lambda: assemble(*given)))
        try:
            with contextlib.redirect_stdout(said):
                code = recipe.check_recipe([scenario["recipe"], *scenario["words"]])
        except InputError as error:
            code, said = 2, io.StringIO(str(error))
    result = f"{scenario['result']}.{os.environ['RANK']}"
    Path(result).write_text(json.dumps({"code": code, "lines": said.getvalue().splitlines()}))


def main(scenarios: str) -> None:
    torch.set_num_threads(1)
    for scenario in json.loads(Path(scenarios).read_text()):
        run_one(scenario)
    shutdown_distributed()
