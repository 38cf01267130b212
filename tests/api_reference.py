"""The API reference: `python -m tests.api_reference [FOLDER]` writes it into build/api, or into FOLDER.

pdoc makes the pages of the Python API and of the extension points from their docstrings, with its warnings as errors:
every name and annotation must resolve. Before that, griffe reads each docstring of vltrain and data_prep: sections must
parse, and what is listed under Args must be in the signature. Needs the extra `docs`.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from pathlib import Path

import griffe
import pdoc

import vltrain
from tests.support.processes import ROOT

EXTENSION_POINTS = (
    "vltrain.config.schema",
    "vltrain.models.interface",
    "vltrain.models.backbones.family",
    "vltrain.models.adapters",
    "vltrain.data.text.conversation",
    "vltrain.evaluate.scorers.scoring",
    "vltrain.export.format",
    "vltrain.metrics.base",
    "data_prep.sources",
)
PACKAGES = ("vltrain", "data_prep")


def write_reference(folder: Path) -> None:
    """Writes the pages. Raises UserWarning for whatever pdoc warns of."""
    for name in vltrain.__all__:  # found when asked for, and pdoc looks without asking; `train` is a package as well
        setattr(vltrain, name, getattr(vltrain, name))
    vltrain.train = importlib.import_module("vltrain.api").train
    try:
        pdoc.render.configure(docformat="google", show_source=False, footer_text=f"vltrain {vltrain.__version__}")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", module="pdoc")
            # The constructor of a NamedTuple, which has no module's names; its fields are looked at by themselves.
            warnings.filterwarnings("ignore", message=r"Error parsing type annotation ForwardRef\(.*\.__init__\.")
            pdoc.pdoc("vltrain", *EXTENSION_POINTS, output_directory=folder)
    finally:
        vltrain.train = importlib.import_module("vltrain.train")


def docstring_faults() -> list[str]:
    """FILE:LINE and the fault, of each docstring whose sections do not parse or name unknown parameters."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("griffe")
    logger.addHandler(handler)
    try:
        loader = griffe.GriffeLoader(
            search_paths=[ROOT],
            docstring_parser=griffe.Parser.google,
            docstring_options={"warn_unknown_params": False, "warn_missing_types": False, "returns_named_value": False},
        )
        for package in PACKAGES:
            found += _unknown_parameters(loader.load(package))
    finally:
        logger.removeHandler(handler)
    return found


def _unknown_parameters(parent: griffe.Module | griffe.Class) -> list[str]:
    found = []
    for member in parent.members.values():
        if member.is_alias:
            continue
        sections = member.docstring.parsed if member.docstring else []
        if member.is_function:
            known = {parameter.name.lstrip("*") for parameter in member.parameters}
            named = [
                parameter
                for section in sections
                if section.kind is griffe.DocstringSectionKind.parameters
                for parameter in section.value
            ]
            unknown = [
                name for parameter in named for name in parameter.name.split(", ") if name.lstrip("*") not in known
            ]
            found += [
                f"{member.relative_filepath}:{member.lineno}: {member.path}: Args: {name}: not in the signature"
                for name in unknown
            ]
        elif member.is_module or member.is_class:
            found += _unknown_parameters(member)
    return found


def main(argv: list[str]) -> int:
    """Writes the reference. Returns 1 where a docstring or pdoc has a complaint."""
    folder = Path(argv[0]) if argv else ROOT / "build" / "api"
    faults = docstring_faults()
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        return 1
    write_reference(folder)
    print(f"{folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
