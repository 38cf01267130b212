"""Data sets of the Hub, streamed from a Hub on this machine, or taken from its cache where none answers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_prep.test_parts import files_of
from tests.support import tables
from tests.support.hub import COMMIT, loopback_hub
from tests.support.processes import ROOT

NAME = "owner/charts"
pytestmark = pytest.mark.slow  # a process that loads the libraries, for each look


def prepared(tmp_path: Path, endpoint: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: the Hub's packages read its address when they are imported."""
    words = ["--source", "datasets", "--output", "out", "--workers", "1", "--options", "val_fraction=0", *options]
    return subprocess.run(
        [sys.executable, "-m", "vltrain", "prepare", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"),
             "HF_HUB_OFFLINE": "0", "HF_TOKEN": "", **environment},
        capture_output=True,
        text=True,
    )  # fmt: skip


@pytest.fixture
def raw(tmp_path) -> Path:
    folder = tables.as_parquet(tmp_path / "raw")
    (folder / "README.md").write_text("---\nlicense: cc-by-sa-4.0\n---\n# Charts\n")
    return folder


def line_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_streamed_as_it_is_read_from_disk(raw, tmp_path):
    with loopback_hub(NAME, raw) as (endpoint, asked):
        done = prepared(tmp_path, endpoint, f"hub={NAME}")
        assert done.returncode == 0, done.stderr
        assert not list((tmp_path / "home").rglob("*.parquet")), "no second copy"
        assert any(COMMIT in one and one.endswith(".parquet") for one in asked)
        shutil.move(tmp_path / "out", tmp_path / "streamed")
        told = line_of(prepared(tmp_path, endpoint, f"hub={NAME}", "revision=v9"))
        assert "hub=owner/charts: has no such revision; name a branch, a tag or a commit of it" in told
        assert "hub=owner/chart: there is no such data set" in line_of(prepared(tmp_path, endpoint, "hub=owner/chart"))
    made = json.loads((tmp_path / "streamed" / "prepared.json").read_text())["provenance"]
    assert made | {"fingerprint": ""} == {"hub": NAME, "revision": COMMIT, "licence": "cc-by-sa-4.0",
                                          "config": "default", "format": "parquet", "fingerprint": ""}  # fmt: skip
    cached = tmp_path / "home" / "hub" / "datasets--owner--charts"
    shutil.rmtree(cached, ignore_errors=True)
    told = line_of(prepared(tmp_path, "http://127.0.0.1:1", f"hub={NAME}"))
    assert "hub=owner/charts: not in the Hub's cache" in told
    assert "the Hub does not answer" in told and f"hf download --repo-type dataset {NAME}" in told
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    shutil.copytree(raw, cached / "snapshots" / COMMIT)  # as hf download leaves it
    done = prepared(tmp_path, "http://127.0.0.1:1", f"hub={NAME}", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    here, there = files_of(tmp_path / "out"), files_of(tmp_path / "streamed")
    assert here.keys() == there.keys()
    assert {name for name in here if here[name] != there[name]} <= {"prepared.json", "prepared.arrow"}


def test_a_gated_set(raw, tmp_path):
    with loopback_hub(NAME, raw, gated=True) as (endpoint, _):
        told = line_of(prepared(tmp_path, endpoint, f"hub={NAME}"))
        assert "hub=owner/charts: is a gated data set; accept its terms on its page, then log in (hf auth" in told
        told = line_of(prepared(tmp_path, endpoint, f"hub={NAME}", HF_TOKEN="hf_bad"))
        assert "is a gated data set, to which this token has no access" in told
        assert prepared(tmp_path, endpoint, f"hub={NAME}", HF_TOKEN="hf_good").returncode == 0
