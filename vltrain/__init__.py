"""vltrain: distributed adapter tuning of vision-language models, on DeepSpeed.

    vltrain.prepare(source, output)       raw data set -> samples
    vltrain.train(recipe, ds=...)         recipe -> a run's folder
    vltrain.load(run)                     a run's folder -> LoadedModel, which answers: ask, chat, stream, loss

Nothing of torch is imported before one of these names is used. What a user can mend is raised as `InputError`.

>>> import vltrain
>>> model = vltrain.load("runs/quickstart")
>>> isinstance(model.ask(["shape.png"], "what color is the shape?"), vltrain.Answer)
True
>>> vltrain.load("runs/nowhere")
Traceback (most recent call last):
    ...
vltrain.errors.InputError: runs/nowhere: no config.yaml in it, expected the folder of a run (the recipe's `output`)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Answer", "InputError", "LoadedModel", "Sample", "Turn", "load", "prepare", "train"]

_PLACES = {
    "Answer": "vltrain.inference",
    "LoadedModel": "vltrain.inference",
    "load": "vltrain.inference",
    "prepare": "vltrain.api",
    "InputError": "vltrain.errors",
    "Sample": "vltrain.schema",
    "Turn": "vltrain.schema",
}

if TYPE_CHECKING:
    from vltrain.api import prepare, train
    from vltrain.errors import InputError
    from vltrain.inference import Answer, LoadedModel, load
    from vltrain.schema import Sample, Turn


def __getattr__(name: str) -> Any:
    if name == "train":
        return importlib.import_module("vltrain.train")  # the package itself, which can be called
    if name not in _PLACES:
        raise AttributeError(f"module 'vltrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
