"""vltrain without a checkout: a wheel, unpacked somewhere, has recipes, DeepSpeed's files and programs, and starts
ranks."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("launch", "ds_configs")


def test_every_package_is_named_in_the_setup() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = set(setup["options"]["packages"].split())
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for room in ("vltrain", "data_prep")
        for path in (ROOT / room).rglob("*.py")
    }
    assert named == found | {f"vltrain.{name}" for name in SHIPPED}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that a wheel of this checkout was unpacked into."""
    pytest.importorskip("setuptools", minversion="70.1")  # from there on it builds wheels by itself
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    for name in ("vltrain", "data_prep", *SHIPPED):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", command, str(folder)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    shutil.rmtree(source)
    return folder / "site"


def run(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(installed),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_names_and_programs_of_an_installed_package(installed, tmp_path):
    """From a folder with nothing in it."""
    shown = run(installed, tmp_path, "-c", "import vltrain; print(vltrain.__file__)")
    assert shown.stdout.strip() == str(installed / "vltrain" / "__init__.py")
    for words in (
        ["train", "--recipe", "quickstart", "--ds", "zero2", "--print_config"],
        ["plan", "table2#ba_8_2", "--ds", "zero3"],
        ["submit", "--recipe", "quickstart", "--ds", "zero2", "--gpus-per-node", "2", "--dry-run"],
    ):
        done = run(installed, tmp_path, "-m", "vltrain", *words)
        assert done.returncode == 0, done.stderr
    files = {
        path.relative_to(ROOT)
        for name in SHIPPED
        for path in (ROOT / name).rglob("*")
        if path.is_file() and path.suffix not in (".sh", ".pyc")
    }
    assert files == {
        path.relative_to(installed / "vltrain")
        for name in SHIPPED
        for path in (installed / "vltrain" / name).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


@pytest.mark.slow
def test_an_installed_package_trains_and_evaluates_on_two_ranks(installed, tmp_path):
    options = '{"train_images": 24, "val_images": 4, "test_images": 4, "image_size": 32}'
    words = [
        "--data.source",
        "shapes",
        "--data.root",
        "data",
        "--data.options",
        options,
        "--data.pack_length",
        "256",
        "--train.max_steps",
        "2",
        "--train.eval_every_steps",
        "0",
        "--train.precision",
        "fp32",
    ]
    done = run(
        installed,
        tmp_path,
        "-m",
        "vltrain",
        "train",
        "--recipe",
        "quickstart",
        "--ds",
        "zero2",
        "--ranks",
        "2",
        "--output",
        "run",
        *words,
    )
    assert done.returncode == 0, done.stderr
    assert "on 2 rank(s)" in done.stderr
    done = run(installed, tmp_path, "-m", "vltrain", "evaluate", "run", "--ranks", "2", "--eval.max_samples", "4")
    assert done.returncode == 0 and "accuracy=" in done.stdout, done.stderr
    done = run(installed, tmp_path, str(installed / "vltrain" / "launch" / "evaluate.py"), "run", "--split", "nothing")
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: ")
