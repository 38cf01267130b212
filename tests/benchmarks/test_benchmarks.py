"""The benchmarks run, give what they say they give, and compare like with like. Nothing here is asserted on time."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from tests.benchmarks.apart import Apart, alone
from tests.benchmarks.measure import alternate, median_ratio
from tests.benchmarks.samples import scienceqa_lengths
from tests.benchmarks.stock import KEPT, OURS, TRL
from tests.benchmarks.stock_competitors import largest_difference, largest_differences, peer_network, plain_losses
from tests.benchmarks.stock_setting import Setting, as_text, prepare, processor_of
from vltrain.models.build import build_model

ROOT = Path(__file__).parents[2]
HAS_TRL = find_spec("trl") is not None
needs_trl = pytest.mark.skipif(not HAS_TRL, reason="trl is not installed: bash launch/setup_env.sh --with bench")


def run_quick(name: str, tmp_path: Path, *words: str) -> dict:
    """`python -m tests.benchmarks.NAME --quick` in a process of its own; what its JSON holds."""
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", "--quick", "--json", str(out), *words]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["quick"] and found["runs"] == 2 and found["machine"]["cores"] >= 1
    return found


def test_competitors_take_turns_and_warm_up_does_not_count():
    calls = []
    results = alternate(
        {"a": lambda: calls.append("a") or len(calls), "b": lambda: calls.append("b") or len(calls)}, runs=2
    )
    assert calls == ["a", "b"] * 3 and results == {"a": [3, 5], "b": [4, 6]}


def test_the_ratio_is_taken_run_by_run():
    assert median_ratio([2.0, 100.0, 6.0], [1.0, 50.0, 1.0]) == 2.0


def test_lengths_follow_the_quantiles():
    lengths = scienceqa_lengths(20_000)
    assert lengths.min() >= 54 and lengths.max() <= 847 and abs(float((lengths <= 230).mean()) - 0.5) < 0.02


def test_a_stock_competitor_trains_on_the_same_loss_and_the_same_text(tmp_path, monkeypatch):
    """Same network, weights and pictures: our packs have a plain loop's losses, and TRL's text our tokens."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    setting = Setting(folder=tmp_path, size=None, precision="fp32", pack_length=512, workers=0)
    prepare(setting, 5, longest=100)
    photos, config, dataset = setting.photos, setting.config("run"), setting.packs
    assert 0 < len(photos.files) < 5
    model, network = build_model(config.model), peer_network(config, torch.float32)
    plain = plain_losses(network, photos, config, dataset, 5)
    assert len(plain) == 5 and largest_difference(model, config, dataset, plain) < 1e-5
    with torch.no_grad():
        network.get_output_embeddings().weight.mul_(1.01)
    assert largest_difference(model, config, dataset, plain_losses(network, photos, config, dataset, 5)) > 1e-5
    if HAS_TRL:
        assert largest_differences(setting, None, 5, with_trl=True)["TRL, fp32"] < 1e-5
    processor, text = processor_of(config), next(sample for sample in photos.samples if not sample.images)
    row = next(dataset.row(number) for number in range(len(dataset)) if text.id in dataset.row(number).sample_ids)
    place = row.sample_ids.index(text.id)
    start = int(row.segment_lengths[:place].sum())
    ids = row.input_ids[start : start + int(row.segment_lengths[place])].tolist()
    assert ids == processor.tokenizer("".join(as_text(text, processor)), add_special_tokens=False).input_ids


@needs_trl
@pytest.mark.skipif(find_spec("torchvision") is None, reason="TRL's trainer reads images through torchvision")
def test_stock_with_every_competitor(tmp_path):
    found = run_quick("stock", tmp_path)
    assert [row["trainer"] for row in found["speed"]] == [KEPT, OURS, TRL]
    assert all(row["useful tokens/s"] > 0 and row["peak GiB"] > 0 for row in found["speed"])
    [differences] = found["largest relative difference of losses to a plain loop's"].values()
    assert set(differences) == {"ours, fp32", "TRL, fp32"} and max(differences.values()) < 1e-5


def test_a_competitor_apart_tells_what_went_wrong_there():
    held = Apart(list, "ab")
    assert held.ask("pop") == "b" and held.ask("pop") == "a"
    with pytest.raises(RuntimeError, match="pop from empty list"):
        held.ask("pop")
    assert held.ask("copy") == []
    held.close()
    for broken, told in ((Apart(int, "x"), "invalid literal"), (Apart(os._exit, 7), "_exit ended with 7")):
        with pytest.raises(RuntimeError, match=told):
            broken.ask("bit_length")
        broken.close()
    assert alone(sum, (1, 2)) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["balance", "overhead", "packing", "loader", "memory", "prepare", "proofs", "samples_memory", "scale"]
)
def test_the_others_run(tmp_path, name):
    found = run_quick(name, tmp_path)
    tables = [rows for rows in found.values() if isinstance(rows, list)]
    assert tables and all(rows for rows in tables)


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"),
    reason="the page counts the operations of torch 2.13: older ones take other kernels on a CPU",
)
@pytest.mark.skipif(
    Version(version("transformers")) < Version("5.24"), reason="the page counts the operations of transformers 5.24"
)
def test_the_roofline_page_shows_what_is_counted(capsys):
    from tests.benchmarks.roofline import main

    main()
    page = (ROOT / "tests" / "benchmarks" / "roofline.md").read_text()
    missing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|") and line not in page]
    assert not missing, "python -m tests.benchmarks.roofline has other figures than the page"


def test_masks_beside_plain_causal_attention(tmp_path):
    rows = run_quick("masks", tmp_path)["masks"]
    assert rows[0]["attention"] == "causal" and len(rows) == 13
    assert rows[0]["times plain causal"] == 1.0 and all(row["ms"] > 0 for row in rows)
