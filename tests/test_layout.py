"""The house's rules that a machine can check: imports go down only, deepspeed has one door, files stay readable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room may import from itself and from rooms further left.
ROOMS = tuple(
    """
    errors console files shipped schema batch config distributed ops data models metrics evaluate receipts memory train
    inference harness export serve doctor prepared launching programs api cli __main__
    """.split()
)
FILES = sorted(path for folder in ("vltrain", "data_prep", "launch") for path in (ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "vltrain" and len(parts) > 1 else None


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.is_relative_to(ROOT / "vltrain")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_imports_go_down_only(path):
    own = path.relative_to(ROOT / "vltrain").parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for module in imported_modules(path):
        room = room_of(module)
        if room in ROOMS:
            assert ROOMS.index(room) <= ROOMS.index(own), f"vltrain.{own} must not import {module}"


def test_every_room_is_in_the_order():
    found = {
        path.name.removesuffix(".py")
        for path in (ROOT / "vltrain").iterdir()
        if path.suffix == ".py" or any(path.glob("*.py"))
    }
    assert found - {"__init__"} <= set(ROOMS)


def test_preparing_data_loads_no_torch():
    """It takes seconds, in each of the worker processes too."""
    command = (
        "import sys, data_prep.prepare, data_prep.pack; sys.exit('torch' in sys.modules or 'transformers' in "
        "sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT).returncode == 0


def test_processes_that_decode_images_load_little():
    """They load their parent's main file and the loader; what trains would take them seconds and half a gigabyte
    each."""
    command = (
        "import runpy, sys; [runpy.run_path(f'launch/{name}.py', run_name='__mp_main__') for name in "
        "('train_mmt', 'train_qformer', 'evaluate')];"
        "import vltrain.data.loader, vltrain.cli; print([name for name in ('transformers', 'deepspeed', 'peft') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_deepspeed_has_one_door():
    importers = {
        str(path.relative_to(ROOT))
        for path in FILES
        if any(name.split(".")[0] == "deepspeed" for name in imported_modules(path))
    }
    assert importers == {"vltrain/train/zero/engine.py"}


def test_the_data_room_knows_no_modules_of_torch():
    for path in (ROOT / "vltrain" / "data").rglob("*.py"):
        assert not any(name == "torch.nn" or name.startswith("torch.nn.") for name in imported_modules(path)), path


def test_model_and_data_rooms_do_not_know_each_other():
    for room, forbidden in (("models", "data"), ("ops", "data"), ("ops", "models"), ("data", "models")):
        for path in (ROOT / "vltrain" / room).rglob("*.py"):
            assert all(room_of(name) != forbidden for name in imported_modules(path)), f"{path} imports {forbidden}"


def test_architectures_are_told_apart_by_their_interface_alone():
    """What differs is said by sections (`vltrain.config.model`) and `vltrain.models.interface`, so that another one is
    a folder and a line: nobody compares a name, or asks for a class."""
    classes = {"InstructBlip", "MultimodalModel", "MmtConfig", "BlipModelConfig"}
    for path in FILES:
        if path.is_relative_to(ROOT / "vltrain" / "config" / "model"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                told = {ast.unparse(side).rpartition(".")[2] for side in (node.left, *node.comparators)}
                assert "architecture" not in told, f"{path}: {ast.unparse(node)}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
                assert not asked & classes, f"{path}: {ast.unparse(node)}"


# What is longer than the rule allows, and is to become shorter: nothing may be added.
LONG = set(
    """
    data_prep/pack.py data_prep/prepare.py
    vltrain/inference/model.py vltrain/ops/triton_adapter.py vltrain/programs/export.py
    vltrain/programs/train.py vltrain/train/checkpoints/checkpoint.py vltrain/train/run/length.py
    vltrain/train/trainer.py vltrain/train/zero/ds_config.py vltrain/train/zero/engine.py
    """.split()
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module opens with what it is and why"
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    too_long = [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 60]
    if text.count("\n") > 400:
        too_long.append(f"the file, of {text.count(chr(10))} lines")
    assert bool(too_long) == (str(path.relative_to(ROOT)) in LONG), too_long


def test_folders_stay_readable():
    for folder in {path.parent for path in FILES}:
        files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 12, f"{folder}: {sorted(files)}"


def calls(path: Path) -> list[tuple[str, str]]:
    """(what is called, its source text) of every call of a method or a module's function."""
    found = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    return [(node.func.attr, ast.unparse(node)) for node in found]


# Who reads JSON that is no user's: texts of libraries, our own that may be cut short while they are read, or is
# compared byte by byte.
OWN_JSON = {
    "vltrain/export/clean_process.py",
    "vltrain/files/strict_json.py",
    "vltrain/files/lock.py",
    "vltrain/distributed/watchdog.py",
    "vltrain/metrics/step_log.py",
    "vltrain/receipts/manifest.py",
    "vltrain/data/text/backend.py",
    "vltrain/data/text/tokenizer.py",
    "vltrain/models/pretrained/hugging_face.py",
    "vltrain/models/pretrained/meta_llama.py",
    "vltrain/models/pretrained/quiet.py",
}


def test_json_of_users_has_one_door():
    found = {
        str(path.relative_to(ROOT))
        for path in FILES
        for name, text in calls(path)
        if name in ("loads", "load", "raw_decode")
        and text.startswith("json.")
        and not text.startswith("json.loads(json.dumps(")
    }
    assert found <= OWN_JSON, f"read it with vltrain.files.strict_json: {found - OWN_JSON}"


def test_lines_of_files_end_in_line_feeds_only():
    """`str.splitlines` also splits at U+2028 and the like, which JSON and texts may hold as they are."""
    for path in FILES:
        for name, text in calls(path):
            assert name != "splitlines" or not any(f".{read}(" in text for read in ("read", "read_text", "decode")), (
                f"{path}: {text}"
            )


def test_top_level_is_what_the_design_says():
    named = {
        "setup.cfg",
        "launch",
        "vltrain",
        "ds_configs",
        "data_prep",
        "tests",
        "README.md",
        "LICENSE",
        "pyproject.toml",
        "typings",
    }
    made = {"data", "runs"}  # by running the programs
    found = {
        path.name for path in ROOT.iterdir() if not path.name.startswith(".") and not path.name.endswith(".egg-info")
    }
    assert found <= named | made, found - named - made
