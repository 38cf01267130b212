"""What `vltrain plan` says of time and of changes that make a recipe fit: figures that follow from its own."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from vltrain.config.command_line import load_settings
from vltrain.distributed import rates
from vltrain.distributed.hardware import GPU_PEAK_FLOPS
from vltrain.distributed.rates import keep_rate, kept_rate, own_device
from vltrain.doctor.gpus import examine_cpu
from vltrain.memory.plan import GIB, TIGHT_SHARE
from vltrain.memory.rehearse import PackSize
from vltrain.programs.checks.ways_out import ways_out
from vltrain.programs.plan import main
from vltrain.train.planning.planned import Way, plan
from vltrain.train.zero.ds_config import load_ds_json


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vltrain" / "rates"


def planned(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    words = ["quickstart", "--data.root", str(tmp_path / "data"), *arguments, "--json", str(tmp_path / "plan.json")]
    assert main(words) == 0
    return json.loads((tmp_path / "plan.json").read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data.root with packs of a few drawings."""
    from tests.data.test_data_report import make_set
    from vltrain.prepared.training_data import ensure_training_data

    folder = tmp_path_factory.mktemp("root")
    make_set(folder / "own")
    settings = load_settings(["--recipe", "quickstart", *_own(folder)], program="test")
    ensure_training_data(settings.config, torch.float32, rebuild=False)
    return folder


def _own(folder: Path) -> list[str]:
    data = {"source": "samples", "input": folder / "own", "root": folder / "data", "eval_split": "test"}
    return [word for name, value in data.items() for word in (f"--data.{name}", str(value))]


def test_hours_are_steps_times_operations_over_the_rate(root: Path, tmp_path: Path, capsys: Any) -> None:
    words = [*_own(root), "--train.epochs", "3", "--data.pack_length", "1024", "--train.packs_per_step", "2"]
    arguments = [*words, "--gpus", "2", "--card", "H100", "--utilisation", "0.5", "--bandwidth", "10"]
    assert main(["quickstart", *arguments, "--json", str(tmp_path / "plan.json")]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    told, sent = plan["duration"], plan["communication_per_step"]["sent_bytes"]
    trained = plan["parameters"]["all"]["trainable"]
    # ZeRO-2 in one micro-step: an all-reduce of all gradients, which sends 2 (N - 1) / N, and an all-gather.
    assert sent == (2 * 4 * trained + 4 * trained) // 2
    assert told["step_seconds"] == pytest.approx(
        plan["flops_per_step"] / (2 * 0.5 * GPU_PEAK_FLOPS["H100"][0]) + sent / 1e10
    )
    assert told["steps"] == round(3 * plan["steps_per_epoch"] + 0.49) and told["epochs"] == 3
    assert told["hours"] == pytest.approx(told["steps"] * told["step_seconds"] / 3600)
    assert told["gpu_hours"] == pytest.approx(2 * told["hours"])
    assert f"{told['steps']} steps, 3 epoch(s)" in capsys.readouterr().out


def test_gpus_without_a_pack_shorten_nothing(tmp_path: Path) -> None:
    told = {}
    for packs, gpus in ((1, 1), (1, 8), (3, 2), (3, 3), (8, 8)):
        words = ["--train.packs_per_step", str(packs), "--gpus", str(gpus), "--card", "H100", "--utilisation", "0.5"]
        told[packs, gpus] = planned(tmp_path, *words)["duration"]["step_seconds"]
    assert told[1, 8] == pytest.approx(told[1, 1]) and told[8, 8] == pytest.approx(told[1, 1])
    assert told[3, 2] == pytest.approx(2 * told[1, 1]) and told[3, 3] == pytest.approx(told[1, 1])


def test_recomputed_blocks_cost_their_forward(tmp_path: Path) -> None:
    pace = ["--card", "A100", "--utilisation", "1"]
    kept, again = (planned(tmp_path, *pace, "--train.activation_checkpointing", value) for value in ("false", "true"))
    assert kept["recomputed_flops_per_step"] == 0 and again["flops_per_step"] == kept["flops_per_step"]
    # Frozen blocks with adapters: forward, and as much again for the gradients of states; adapters' weights beside.
    assert 0.3 < again["recomputed_flops_per_step"] / kept["flops_per_step"] < 0.5
    ratio = again["duration"]["step_seconds"] / kept["duration"]["step_seconds"]
    assert ratio == pytest.approx(1 + again["recomputed_flops_per_step"] / kept["flops_per_step"])


def test_the_doctors_rate_is_what_hours_are_told_by(tmp_path: Path, cache: Path, capsys: Any) -> None:
    nothing = planned(tmp_path, "--train.precision", "fp32")
    assert nothing["duration"]["step_seconds"] is None and "run vltrain doctor" in capsys.readouterr().out
    if torch.cuda.is_available():
        keep_rate(own_device(), "fp32", 1e12)
    else:
        found = examine_cpu().numbers["fp32_gflops"]
        rate = kept_rate(own_device(), "fp32")
        assert rate is not None and rate.flops == pytest.approx(1e9 * found) and rate.days_old == 0
    plan = planned(tmp_path, "--train.precision", "fp32")
    rate = kept_rate(own_device(), "fp32")
    assert rate is not None and len(list(cache.glob("*-fp32.json"))) == 1
    assert plan["duration"]["step_seconds"] == pytest.approx(plan["flops_per_step"] / rate.flops)
    assert "at least that" in plan["duration"]["origin"]
    if not torch.cuda.is_available():  # ranks would share its cores
        assert planned(tmp_path, "--train.precision", "fp32", "--gpus", "2")["duration"]["step_seconds"] is None
    half = planned(tmp_path, "--train.precision", "fp32", "--utilisation", "0.5")
    assert half["duration"]["step_seconds"] == pytest.approx(2 * plan["duration"]["step_seconds"])


def test_rates_that_are_old_or_damaged(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_rate("A card, of 2026", "bf16", 3e12)
    [file] = cache.iterdir()
    content = json.loads(file.read_text())
    assert kept_rate("A card, of 2026", "bf16") == rates.Rate(**content) and kept_rate("A card", "bf16") is None
    monkeypatch.setattr("vltrain.train.planning.pace.own_device", lambda: "A card, of 2026")
    file.write_text(json.dumps({**content, "day": "2020-01-01"}))
    assert "days ago: --measure" in planned(tmp_path)["duration"]["origin"]
    for damaged in ("", "{}", json.dumps({**content, "day": "soon"}), json.dumps({**content, "flops": 0})):
        file.write_text(damaged)
        assert kept_rate("A card, of 2026", "bf16") is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--card", "H100"], "without --utilisation"),
        (["--card", "H10", "--utilisation", "0.4"], "did you mean"),
        (["--utilisation", "1.5"], "expected a share"),
        (["--bandwidth", "fast"], "--bandwidth"),
        (["--measure", "--card", "H100", "--utilisation", "0.4"], "--measure"),
    ],
)
def test_mistakes(arguments: list[str], said: str, capsys: Any) -> None:
    assert main(["quickstart", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1, error


@pytest.mark.slow
def test_changes_make_it_fit_as_their_own_plans_say(root: Path, tmp_path: Path, capsys: Any) -> None:
    """The recipe as it is does not fit into a little less than it needs; each change told is planned by itself, with
    the words that are told."""

    def plan_of(*words: str) -> dict[str, Any]:
        arguments = ["quickstart", *_own(root), "--card", "A100", "--utilisation", "0.4", *words]
        assert main([*arguments, "--json", str(tmp_path / "plan.json")]) == 0
        return json.loads((tmp_path / "plan.json").read_text())

    before = plan_of("--train.packs_per_step", "4")
    room = (before["memory_per_rank"]["peak_bytes"] - 2**20) / TIGHT_SHARE / GIB
    assert before["changes"] is None
    changes = plan_of("--train.packs_per_step", "4", "--gpu-memory", str(room))["changes"]
    told = changes["cheapest"]
    assert told and "25 GB/s between ranks, assumed" in changes["ranked_by"]
    assert [one["slower"] for one in told] == sorted(one["slower"] for one in told)
    assert told[0]["line"] in capsys.readouterr().out
    for one in told[:2]:
        after = plan_of(*([] if "packs_per_step" in one["settings"] else ["--train.packs_per_step", "4"]),
                        *shlex.split(one["settings"]))  # fmt: skip
        if "pack_length" not in one["settings"]:  # whose packs would be made anew
            assert after["memory_per_rank"]["peak_bytes"] == one["peak"]
        assert one["peak"] <= TIGHT_SHARE * room * GIB
    nothing = plan_of("--gpu-memory", "0.1")
    assert nothing["changes"]["cheapest"] == [] and "nothing that was tried" in capsys.readouterr().out


@pytest.mark.slow
def test_what_did_not_fit_is_told_with_ways_out(root: Path) -> None:
    settings = load_settings(["--recipe", "quickstart", *_own(root), "--train.packs_per_step", "4"], program="test")
    pack = PackSize(num_tokens=1024, num_images=40, num_label_tokens=82, num_segments=40, origin="a test")
    ds_json = load_ds_json(None)
    way = Way(config=settings.config, ds_json=ds_json, num_gpus=1, dtype=torch.float32, pack=pack, packs=None)
    first, *changes = ways_out(way, memory_bytes=2**40)  # the plan fits, what was tried did not
    peak = plan(way).memory.peak / GIB
    assert first.found.startswith(f"planned were {peak:.2f} GiB, 1024.00 are there; cheapest")
    assert changes and all("GiB, +" in one.found or "GiB, -" in one.found for one in changes)
    [nothing] = ways_out(way, memory_bytes=2**20)
    assert "nothing that was tried fits" in nothing.found
