"""What lmms-eval finds by the entry point `lmms_eval.models`: that there is a model called `vltrain`, and where its
class is.

Apart from the class, since lmms-eval loads entry points while its own modules are only half loaded.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """An `lmms_eval.models.registry_v2.ModelManifest`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="vltrain", chat_class_path="vltrain.harness.lmms_eval.VLTrain")
