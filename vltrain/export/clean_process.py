"""Reads an exported folder as its users will: in a process of its own, by the lines of its model card, where `vltrain`
cannot be imported.

    python -P clean_process.py JOB

JOB is a folder: job.json says which lines to run and what to ask, cases.safetensors what goes with that; answers.json
and logits.safetensors are left in it. Nothing of vltrain is imported here, so that this file runs wherever the stock
libraries do.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "pillow")


class Block(MetaPathFinder):
    """Lets the packages of these names be missing."""

    def __init__(self, names: list[str]) -> None:
        self.names = set(names)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r} (kept out on purpose)", name=name)


def main(job: Path) -> None:
    """Answers every case of a job."""
    told = json.loads((job / "job.json").read_text(encoding="utf-8"))
    sys.meta_path.insert(0, Block(told["blocked"]))
    import torch
    from safetensors.torch import load_file, save_file

    cases = load_file(job / "cases.safetensors")
    space: dict[str, Any] = {"folder": told["folder"], "base": told["base"], "run": told["run"], "torch": torch}
    answers, logits = [], {}
    with torch.no_grad():
        exec(compile(told["load"], "<load>", "exec"), space)
        for number, case in enumerate(told["cases"]):
            given = {name.partition(".")[2]: value for name, value in cases.items() if name.startswith(f"{number}.")}
            space |= {
                "image": _open(case["images"], case["draft"]),
                "question": case["question"],
                "max_new_tokens": case["max_new_tokens"],
                "case": given,
            }
            space["answer_ids"] = given["answer_ids"][None]
            exec(compile(told["ask"], "<ask>", "exec"), space)
            answers.append({"text": space["answer"], "tokens": space["new"].tolist() if "new" in space else None})
            exec(compile(told["logits"], "<logits>", "exec"), space)
            logits[str(number)] = space["logits"].float().contiguous()
    save_file(logits, job / "logits.safetensors")
    loaded = sorted(name for name in sys.modules if name.partition(".")[0] == "vltrain")
    versions = {
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := _version(name)) is not None},
    }
    result = {"answers": answers, "versions": versions, "loaded": loaded[:1]}
    (job / "answers.json").write_text(json.dumps(result), encoding="utf-8")


def _open(images: list[str], draft: int | None) -> Any:
    """None, one image, or a list of several: as users hand them over. `draft`: of JPEGs, pixels that either edge
    keeps."""
    from PIL import Image

    opened = [Image.open(path) for path in images]
    for image in opened if draft is not None else ():
        image.draft(None, (draft, draft))  # of other kinds it does nothing
    return None if not opened else opened[0] if len(opened) == 1 else opened


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
