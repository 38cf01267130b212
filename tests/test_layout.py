"""The house's rules that a machine can check: imports go down only, deepspeed has one door, files stay readable."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room may import from itself and from rooms further left.
ROOMS = tuple(
    """
    errors console files families shipped schema batch config distributed ops data html models metrics evaluate receipts
    memory train inference harness export serve audit doctor preflight prepared launching programs api cli __main__
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


@pytest.mark.parametrize("room", [room for room in ROOMS if (ROOT / "vltrain" / room).is_dir()])
def test_a_room_says_what_it_imports(room):
    folder = ROOT / "vltrain" / room
    head = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    said = head.partition("Imports:")[2].partition(".")[0].replace(",", " ").split()
    rooms = {room_of(module) for path in folder.rglob("*.py") for module in imported_modules(path)}
    assert said == [one for one in ROOMS if one in rooms - {room}]


# Within rooms: a folder may import from those further left, and from itself.
FLOORS = (
    "vltrain.data.text vltrain.data",
    "vltrain.evaluate.scorers vltrain.evaluate.answering vltrain.evaluate",
    "vltrain.train.zero vltrain.train.checkpoints vltrain.train.run vltrain.train",
    "vltrain.serve vltrain.serve.page",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def module_graph() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports, anywhere in it: for type checkers alone and in functions, too."""
    modules = {module_name(path): path for path in FILES}
    graph = {}
    for name, path in modules.items():
        found = imported_modules(path)
        named = {one for one in found if one in modules}
        # `from PACKAGE import MODULE` is of the module: the package runs first, but is not what is used.
        packages = {one for one in named if modules[one].name == "__init__.py"}
        used = {one for one in packages if any(other.startswith(f"{one}.") for other in named)}
        graph[name] = named - used - {name}
    return graph


def test_no_module_imports_itself_through_others():
    graph = module_graph()

    def reaches_itself(name: str) -> bool:
        seen, left = set(), list(graph[name])
        while left:
            if (one := left.pop()) not in seen:
                seen.add(one)
                left += graph[one]
        return name in seen

    assert {name for name in graph if reaches_itself(name)} == set()


@pytest.mark.parametrize("floors", FLOORS)
def test_folders_of_a_room_import_down_only(floors):
    order = floors.split()

    def floor_of(name: str) -> str:
        folder = name if (ROOT / name.replace(".", "/")).is_dir() else name.rpartition(".")[0]
        return folder

    for name, imported in module_graph().items():
        own = floor_of(name)
        for other in imported:
            if own in order and floor_of(other) in order:
                assert order.index(floor_of(other)) <= order.index(own), f"{name} must not import {other}"


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
    """And its Adam for offloaded states, which is compiled at first use, one beside it."""
    importers = {
        str(path.relative_to(ROOT))
        for path in FILES
        if any(name.split(".")[0] == "deepspeed" for name in imported_modules(path))
    }
    assert importers == {"vltrain/train/zero/engine.py", "vltrain/train/zero/cpu_adam.py"}


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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module opens with what it is and why"
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    too_long = [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 60]
    if text.count("\n") > 400:
        too_long.append(f"the file, of {text.count(chr(10))} lines")
    assert not too_long


MOST_PARAMETERS = 8
# Functions that take more, and why: nothing may be added.
# Functions that take more; nothing may be added. What transformers (attention, a processor) and torch (an operator's
# tensors) call has their signatures; elsewhere each parameter is a thing of its own, named where it is called.
MANY_PARAMETERS = set(
    """
    vltrain.config.command_line.load_settings
    vltrain.evaluate.answering.decoding.Decoder.__init__ vltrain.evaluate.answering.generate.generate
    vltrain.export.formats.modeling_vltrain_mmt.VltrainMmtProcessor.__init__
    vltrain.inference.model.LoadedModel.__init__
    vltrain.ops.attention._of_packed_rows.forward
    vltrain.ops.triton_adapter._ vltrain.ops.triton_adapter.run_backward vltrain.ops.triton_adapter.run_forward
    vltrain.train.checkpoints.checkpoint.save_checkpoint
    vltrain.train.run.provenance.write_provenance
    """.split()
)


def test_functions_take_few_parameters():
    found = {}
    for path in FILES:
        for name, function in functions_of(path):
            arguments = function.args
            named = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            count = len([one for one in named if one not in ("self", "cls", "ctx")])
            count += (arguments.vararg is not None) + (arguments.kwarg is not None)
            if count > MOST_PARAMETERS:
                found[name] = count
    assert found.keys() == MANY_PARAMETERS, found.keys() ^ MANY_PARAMETERS


def functions_of(path: Path) -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(MODULE.CLASS.FUNCTION, its node) of all functions of a file but kernels, whose arguments are a device's."""
    found = []

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if not any("triton.jit" in ast.unparse(one) for one in child.decorator_list):
                    found.append((f"{prefix}.{child.name}", child))
                walk(child, f"{prefix}.{child.name}")
            elif isinstance(child, ast.ClassDef):
                walk(child, f"{prefix}.{child.name}")
            else:
                walk(child, prefix)

    walk(ast.parse(path.read_text()), module_name(path))
    return found


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
    "vltrain/data/stock/layouts.py",
    "vltrain/data/stock/source.py",
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
    }
    made = {"data", "runs"}  # by running the programs
    found = {
        path.name for path in ROOT.iterdir() if not path.name.startswith(".") and not path.name.endswith(".egg-info")
    }
    assert found <= named | made, found - named - made
