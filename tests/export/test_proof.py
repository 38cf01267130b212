"""The proof of an export: folders that do not compute what the run does are never left, and nothing of vltrain is
needed to read one."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.export_run import mmt_run
from vltrain.cli import main
from vltrain.export import table
from vltrain.export.clean_process import Block
from vltrain.export.proof import PROOF
from vltrain.programs.export import export

MODEL, CONFIG, PROCESSOR = "model.safetensors", "config.json", "processor_config.json"
QUERY = "language_model.layers.1.self_attn.q_proj"


def weights(change):
    def fault(folder: Path) -> None:
        found = load_file(folder / MODEL)
        change(found)
        save_file(
            {name: value.contiguous() for name, value in found.items()}, folder / MODEL, metadata={"format": "pt"}
        )

    return fault


def settings(name, **changes):
    def fault(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        for key, value in changes.items():
            assert key in found and found[key] != value
        (folder / name).write_text(json.dumps({**found, **changes}))

    return fault


FAULTS = {
    "a transposed weight": weights(lambda found: found.update({f"{QUERY}.weight": found[f"{QUERY}.weight"].t()})),
    "a dropped bias": weights(lambda found: found.update({f"{QUERY}.bias": torch.zeros_like(found[f"{QUERY}.bias"])})),
    "an untied head": settings(CONFIG, tie_word_embeddings=False),
    "modality rows exchanged": weights(
        lambda found: found["language_model.embed_tokens.weight"][-2:].copy_(
            found["language_model.embed_tokens.weight"][-2:].flip(0)
        )
    ),
    "another tap": settings(CONFIG, tap_every=1),
    "another mean": settings(PROCESSOR, image_mean=[0.5, 0.5, 0.5]),
    "another filter": settings(PROCESSOR, resample=2),
    "no BOS": settings(PROCESSOR, bos_token_id=None),
    "cut short": settings("generation_config.json", max_new_tokens=1),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return mmt_run(tmp_path_factory.mktemp("run"), llm_config={"tie_word_embeddings": True})


@pytest.fixture
def with_fault(monkeypatch):
    """Lets the format `mmt` write a folder and then do something to it."""

    def plant(fault):
        good = table.FORMATS["mmt"]["mmt"]

        def write(folder, source, choices):
            good.write(folder, source, choices)
            fault(folder)

        monkeypatch.setitem(table.FORMATS["mmt"], "mmt", dataclasses.replace(good, write=write))

    return plant


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_leaves_no_folder(fault, run, with_fault, here, tmp_path, capsys):
    with_fault(FAULTS[fault])
    assert main(["export", str(run), "--output", str(tmp_path / "out"), "--format", "mmt"]) == 2
    told = capsys.readouterr().err
    assert "proof: " in told and told.count("\n") == 1, told
    assert list(tmp_path.glob("**/out")) == [] and not list(tmp_path.glob(".out*"))


def test_a_folder_that_cannot_be_read_is_told_in_a_line(run, with_fault, tmp_path, capsys):
    """By the clean process itself."""
    with_fault(lambda folder: (folder / "modeling_vltrain_mmt.py").write_text("import vltrain\n"))
    assert main(["export", str(run), "--output", str(tmp_path / "out"), "--format", "mmt", "--proof-samples", "1"]) == 2
    told = capsys.readouterr().err
    assert "a clean process could not read the exported folder" in told and "vltrain" in told and told.count("\n") == 1
    assert list(tmp_path.glob("**/out")) == []


def test_the_clean_process_knows_nothing_of_vltrain(run, tmp_path):
    """The proof's own process, and the card's lines in one of our own where vltrain cannot be imported."""
    out = tmp_path / "out"
    assert main(["export", str(run), "--output", str(out), "--format", "mmt", "--proof-samples", "3"]) == 0
    proof = json.loads((out / PROOF).read_text())
    assert (
        proof["proven"]
        and len(proof["samples"]) == 3
        and proof["read_by"].startswith("stock libraries")
        and "transformers" in proof["versions"]
    )
    card = (out / "README.md").read_text()
    lines = (
        card.partition("```python\n")[2]
        .partition("```")[0]
        .replace('"picture.png"', repr(str(run.parent / "data" / "samples" / "0.png")))
        .replace('"out"', repr(str(out)))
    )
    alone = f"import sys\nsys.modules['vltrain'] = None\n{lines}"
    done = subprocess.run(
        [sys.executable, "-I", "-c", alone],
        capture_output=True,
        text=True,
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "dtype" not in done.stdout and len(done.stdout.splitlines()) == 1


def test_what_is_kept_out_cannot_be_imported():
    with pytest.raises(ModuleNotFoundError, match="vltrain.models"):
        Block(["vltrain"]).find_spec("vltrain.models")
    assert Block(["vltrain"]).find_spec("vltrainer") is None


def test_options_of_the_proof(run, tmp_path, here, capsys):
    out = ["export", str(run), "--output", str(tmp_path / "out")]
    for words, said in (
        (["--proof", "all"], "expected none"),
        (["--proof-samples", "0"], "from 1 to"),
        (["--proof-samples", "-1"], "from 1 to"),
        (["--proof-samples", "x"], "from 1 to"),
        (["--proof", "none", "--proof-samples", "3"], "has no effect"),
        (["--format", "adapters", "--dtype", "bf16"], "has no effect on the format adapters"),
        (["--dtype", "fp8"], "expected one of fp32, bf16, fp16"),
        (["--format", "peft"], "has no format 'peft'"),
        (["--format", "adapters", "--checkpoint", "none"], "nothing tuned"),
    ):
        assert main([*out, *words]) == 2
        assert said in capsys.readouterr().err, words
    samples = run.parent / "data" / "samples" / "test.jsonl"
    samples.rename(samples.with_suffix(".away"))
    try:
        assert main(out) == 2
        told = capsys.readouterr().err
        assert "--proof none" in told and "test.jsonl" in told and not (tmp_path / "out").exists()
        assert main([*out, "--proof", "none"]) == 0
    finally:
        samples.with_suffix(".away").rename(samples)
    assert json.loads((tmp_path / "out" / PROOF).read_text())["proven"] is False
    assert "nobody has compared" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_tells_what_the_run_knows(run, tmp_path, here):
    evaluated = run / "eval" / "test"
    evaluated.mkdir(parents=True)
    (evaluated / "metrics.json").write_text(
        json.dumps(
            {
                "split": "test",
                "step": 7,
                "scorer": "exact",
                "measure": "accuracy",
                "accuracy": 0.75,
                "correct": 6,
                "total": 8,
            }
        )
    )
    (run / "eval" / "val").mkdir()
    (run / "eval" / "val" / "metrics.json").write_text(
        json.dumps(
            {
                "split": "val",
                "step": 6,
                "scorer": "exact",
                "measure": "accuracy",
                "accuracy": 0.5,
                "correct": 4,
                "total": 8,
            }
        )
    )
    export(run, tmp_path / "out", "mmt")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| test | exact | accuracy | 0.7500 | 6 of 8 |" in card and "| val |" not in card, (
        "of these very weights alone"
    )
    assert "license: unknown" in card and "tap_every: 2" in card and "step 7" in card and "8 answers are those" in card


def test_check_export_asks_again(run, with_fault, here, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(run), "--output", str(out), "--format", "mmt", "--proof-samples", "2"]) == 0
    assert main(["check", "export", str(out), "--proof-samples", "3"]) == 0
    assert "ok      3 of 3 answers" in capsys.readouterr().out
    FAULTS["a dropped bias"](out)
    assert main(["check", "export", str(out)]) == 1
    assert (
        "FAILED  proof: sample 'sample 0': the exported folder does not compute what the run does"
        in capsys.readouterr().out
    )
    for words, said in (
        ([str(tmp_path)], "expected a folder that `vltrain export` wrote"),
        ([str(out), "--run", str(tmp_path / "x")], "no longer exists there"),
        ([], "expected FOLDER"),
    ):
        assert main(["check", "export", *words]) == 2
        assert said in capsys.readouterr().err
