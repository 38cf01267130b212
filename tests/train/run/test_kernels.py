"""A run goes on with the kernels that it began with, whatever `auto` would choose now."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.tiny import tiny_config
from vltrain.config.model.mmt import MmtConfig
from vltrain.models.build import build_model
from vltrain.ops.attention_choice import IMPLEMENTATIONS
from vltrain.train.checkpoints.checkpoint import Checkpoint
from vltrain.train.run.kernels import KEPT, chosen_kernels, kernels_as_begun

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def begun(**run_state: object) -> Checkpoint:
    return Checkpoint(path=Path("step-00000001"), step=1, belongs_to={}, run_state=run_state)


def asking(attention: str) -> MmtConfig:
    model = tiny_config(model__llm__attention=attention).model
    assert isinstance(model, MmtConfig)
    return model


def as_begun(asked: str, checkpoint: Checkpoint | None, *given: str, runs_on: torch.device = CPU) -> str:
    model = kernels_as_begun(asking(asked), checkpoint, given, runs_on)
    assert isinstance(model, MmtConfig)
    return model.llm.attention


@pytest.mark.parametrize("attention", ["sdpa", "tiled", "eager"])
def test_auto_becomes_what_the_run_was_built_with(attention: str, caplog: pytest.LogCaptureFixture) -> None:
    first = build_model(asking(attention), dtype=torch.float32)
    checkpoint = begun(**{KEPT: chosen_kernels(first)})
    with caplog.at_level("INFO"):
        second = build_model(kernels_as_begun(asking("auto"), checkpoint, (), CPU), dtype=torch.float32)
    assert chosen_kernels(second) == chosen_kernels(first) == {"attention": attention, "kernels": "torch"}
    assert second.llm.config._attn_implementation == IMPLEMENTATIONS.get(attention, attention)
    assert f"model.llm.attention: {attention}, as the run began" in caplog.text


def test_what_somebody_names_counts() -> None:
    checkpoint = begun(kernels={"attention": "sdpa", "kernels": "torch"})
    assert as_begun("eager", checkpoint) == "eager"
    assert as_begun("auto", checkpoint, "model.llm.attention") == "auto", "a given auto chooses anew"
    assert as_begun("auto", checkpoint, "model.llm.kernels") == "sdpa"


def test_a_run_that_kept_none_goes_on_as_it_was_done_then() -> None:
    assert as_begun("auto", begun()) == "sdpa", "there was nothing else on CPUs"
    assert as_begun("auto", begun(), runs_on=CUDA) == "auto", "what flash-attn it had nobody knows"
    assert as_begun("auto", None) == "auto", "a run that begins"


def test_no_identity_says_them() -> None:
    """A run goes on from a life that named its kernels: they are no part of what it is."""
    llm = replace(asking("auto").llm, attention="sdpa", kernels="torch")
    assert replace(asking("auto"), llm=llm).identity() == asking("auto").identity()
