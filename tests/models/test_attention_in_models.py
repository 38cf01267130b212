"""Each implementation of attention in whole models: losses and gradients of a packed row, and answers, are those of
packed SDPA."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import attention_kernels

ROOT = Path(__file__).parents[2]
KERNELS = {
    "flash_attention_2": "flash 2",
    "flash_attention_3": "flash 3",
    "flash_attention_4": "flash 4",
    "varlen": "varlen 2.12",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What `attention_worker` found, with stand-ins of all three packages installed."""
    folder = tmp_path_factory.mktemp("packages")
    for distribution in attention_kernels.FILES:
        attention_kernels.install(folder, distribution)
    output = folder / "results.json"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("attention_worker.py")), str(output)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("name", KERNELS)
def test_a_packed_row_and_answers_are_those_of_packed_sdpa(results, name) -> None:
    if name == "varlen" and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        pytest.skip("torch has varlen_attn from 2.10 on")
    found = results[name]
    layers = 3
    assert (found["kernel"], found["segments"]) == (KERNELS[name], 4), "the row's segments did not reach the kernel"
    ways = [way for way in ("plain", "checkpointing", "compiled") if way in found]
    assert len(ways) == (3 if name == "varlen" else 2)
    assert [found[f"{way} calls"] for way in ways] == [2 * layers if way == "checkpointing" else layers for way in ways]
    assert max(found[way] for way in ways) < 1e-9
    assert found["window calls"] == 2 and found["window"] < 1e-9
    assert found["bf16"] < 1e-2
    assert found["answers 1"] == found["answers 7"] == found["prompts"] > 30
