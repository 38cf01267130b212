"""`vltrain audit`, and the audit before a first step."""

import json

import pytest

from tests.audit.configs import config_of
from vltrain.audit import recipe, stored
from vltrain.audit.findings import Finding, Report
from vltrain.config.model.mmt import MmtConfig
from vltrain.errors import InputError
from vltrain.programs.audit import main

FAILS = Report(
    model="x", kind="llama", small=1, seconds=1.0,
    findings=[
        Finding(what="states packed = alone", passed=False, difference=0.5, where="segment 3 of 6 sees segment 2"),
        Finding(what="loss packed = alone", passed=True, difference=1e-7),
    ],
)  # fmt: skip


def test_a_folder_with_a_config_alone(tmp_path, capsys):
    config_of("gemma2").save_pretrained(tmp_path)
    assert main([str(tmp_path), "--json", str(tmp_path / "audit.json")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("[")]  # DeepSpeed's
    assert "checks passed" in lines[-1] and "gemma2" in lines[-1]
    assert all(line[:4] in ("pass", "told") for line in lines[:-1])
    (report,) = json.loads((tmp_path / "audit.json").read_text())
    assert report["passed"] and len(report["findings"]) == len(lines) - 1
    assert all(one["difference"] <= one["bound"] for one in report["findings"] if one["passed"] and one["difference"])


def test_a_failure_is_one_line_and_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(recipe, "_answer", lambda question: FAILS)
    assert main(["quickstart"]) == 1
    shown = capsys.readouterr()
    assert "FAIL  states packed = alone" in shown.out and "1 of 2 checks passed" in shown.out
    assert shown.err.splitlines()[-1] == (
        "audit: llama: states packed = alone does not hold (difference 5.0e-01, at most 1e-05): segment 3 of 6 sees "
        "segment 2"
    )


def test_mistakes(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lama"}))
    cases = {
        "did you mean 'llama'?": [str(tmp_path)],
        "no config.json": [str(tmp_path.parent)],
        "expected one model or recipe": [],
        "no recipe of that name": ["quickstrat"],
        "a file in a folder that exists": [str(tmp_path), "--json", str(tmp_path / "none" / "a.json")],
    }
    for said, words in cases.items():
        assert main(words) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "a.B"}}))
    assert main([str(tmp_path)]) == 2
    assert "runs code of its own folder" in capsys.readouterr().err


def test_a_report_survives_being_stored():
    assert Report.from_json(json.loads(json.dumps(FAILS.to_json()))) == FAILS


def test_before_a_first_step_once_for_a_config(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []
    good = Report(model="x", kind="llama", small=1, seconds=1.0, findings=FAILS.findings[1:])
    monkeypatch.setattr(recipe, "_answer", lambda question, **named: asked.append(question) or good)
    model = MmtConfig()
    recipe.require_audited(model)
    recipe.require_audited(model)
    assert len(asked) == 1
    model.llm.source, model.llm.tokenizer = None, "asset://tiny_llama"
    model.llm.config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    recipe.require_audited(model)
    assert len(asked) == 2
    monkeypatch.setattr(stored, "_versions", lambda: {"torch": "another"})
    recipe.require_audited(model)
    assert len(asked) == 3


def test_a_family_that_fails_is_refused_before_anything_is_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(recipe, "_answer", lambda question, **named: FAILS)
    for _ in range(2):  # a stored failure is one, too
        with pytest.raises(InputError, match="segment 3 of 6 sees segment 2"):
            recipe.require_audited(MmtConfig())
