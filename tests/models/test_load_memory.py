"""No load holds two copies of a network: the peak of a process that does nothing else, against the size of the
weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
WIDTH, FFN, LAYERS, HEADS, VOCABULARY = 512, 1536, 10, 8, 2048
MEASURABLE = os.access("/proc/self/clear_refs", os.W_OK)
pytestmark = pytest.mark.skipif(not MEASURABLE, reason="needs Linux' /proc/self/clear_refs")


def write_meta(folder: Path, num_layers: int, num_shards: int) -> None:
    folder.mkdir()
    params = {"dim": WIDTH, "n_layers": num_layers, "n_heads": HEADS, "norm_eps": 1e-5, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params))
    rows, columns = {"wq": WIDTH, "wk": WIDTH, "wv": WIDTH}, {"wo": WIDTH}
    for number in range(num_shards):
        shard = {
            "norm.weight": torch.ones(WIDTH),
            "tok_embeddings.weight": torch.randn(VOCABULARY, WIDTH // num_shards),
        }
        shard["output.weight"] = torch.randn(VOCABULARY // num_shards, WIDTH)
        for layer in range(num_layers):
            block = {f"attention.{name}": (width // num_shards, WIDTH) for name, width in rows.items()}
            block |= {f"attention.{name}": (WIDTH, width // num_shards) for name, width in columns.items()}
            block |= {f"feed_forward.{name}": (FFN // num_shards, WIDTH) for name in ("w1", "w3")}
            block |= {"feed_forward.w2": (WIDTH, FFN // num_shards)}
            block |= {"attention_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
            shard |= {f"layers.{layer}.{name}.weight": torch.ones(shape) for name, shape in block.items()}
        torch.save({name: weight.half() for name, weight in shard.items()}, folder / f"consolidated.{number:02d}.pth")


def write_hugging_face(folder: Path, num_layers: int) -> None:
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=num_layers,
        num_attention_heads=HEADS,
        vocab_size=VOCABULARY,
    )
    LlamaForCausalLM(config).half().save_pretrained(folder, max_shard_size="20MB")


def measure(source: Path, dtype: str, warm_up: Path) -> dict[str, int]:
    command = [sys.executable, str(Path(__file__).with_name("load_memory_worker.py")), str(source), dtype, str(warm_up)]
    # Every tensor gets pages of its own. By default glibc raises this threshold as tensors are let go, and then hands
    # out again what the warm-up left in its heap, so that a load seems to take from 0.7 to 1.07 copies, by chance.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "131072"}
    environment = {**os.environ, **allocator, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("num_shards, dtype", [pytest.param(1, "float16", marks=pytest.mark.slow), (2, "bfloat16")])
def test_metas_layout_takes_one_copy_even_with_the_mapped_pages(tmp_path: Path, num_shards: int, dtype: str) -> None:
    """Each block's files are let go before the next block's are read, so the pages of the files do not add up
    either."""
    write_meta(tmp_path / "llama", LAYERS, num_shards)
    write_meta(tmp_path / "small", 1, num_shards)
    measured = measure(tmp_path / "llama", dtype, tmp_path / "small")
    assert measured["size"] > 60e6
    assert 0.95 * measured["size"] < measured["rss_bytes"] < 1.3 * measured["size"]


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_a_sharded_hugging_face_folder_takes_one_copy_even_with_the_mapped_pages(tmp_path: Path, dtype: str) -> None:
    write_hugging_face(tmp_path / "llama", LAYERS)
    write_hugging_face(tmp_path / "small", 1)
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 3
    measured = measure(tmp_path / "llama", dtype, tmp_path / "small")
    assert 0.95 * measured["size"] < measured["rss_bytes"] < 1.3 * measured["size"]
