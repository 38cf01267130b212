"""MLflow: open, and of all trackers the one that most teams run a server of. MLFLOW_TRACKING_URI says where to (a
server, a database), MLFLOW_EXPERIMENT_NAME the experiment (else `vltrain`). Without a URI a database in the run's
folder: `mlflow ui --backend-store-uri sqlite:///RUN/mlflow/mlflow.db`, from any environment that has all of MLflow.

Only its client is installed (mlflow-skinny). A run that goes on is the same run there: its id is kept in the run's
folder. Metrics are sent by MLflow's thread; a failure shows at the next flush.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image

from vltrain.files.atomic import write_whole
from vltrain.metrics.base import RunContext

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPERIMENT = "vltrain"
MOST_PARAMS = 100  # of one request
MOST_LETTERS = 500  # of a parameter's value, in older servers


class MlflowLogger:
    """A run of MLflow's tracking store."""

    package: ClassVar[str] = "mlflow"
    install: ClassVar[str] = "pip install 'vltrain[mlflow]'"

    def __init__(self, run: RunContext) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._metric = Metric
        self._pending: list[Any] = []
        folder = (run.folder / "mlflow").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        store = uri or f"sqlite:///{folder / 'mlflow.db'}"
        self._client = MlflowClient(store, store)
        self._run_id = self._resumed(folder) or self._created(run, folder, is_local=uri is None)

    def _resumed(self, folder: Path) -> str | None:
        """The run that an earlier life of this one began, if the store has it."""
        from mlflow.exceptions import MlflowException

        try:
            run_id = (folder / "run_id").read_text()
            self._client.update_run(run_id, status="RUNNING")
        except (FileNotFoundError, MlflowException):
            return None
        return run_id

    def _created(self, run: RunContext, folder: Path, *, is_local: bool) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            experiment = found.experiment_id
        else:
            place = (folder / "artifacts").as_uri() if is_local else None
            experiment = self._client.create_experiment(name, artifact_location=place)
        run_id = self._client.create_run(experiment, run_name=run.folder.resolve().name).info.run_id
        params = [Param(key, str(value)[:MOST_LETTERS]) for key, value in _flat(run.settings)]
        for start in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(run_id, params=params[start : start + MOST_PARAMS])
        write_whole(folder / "run_id", run_id)
        return run_id

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(_as_key(name), value, now, step) for name, value in values.items()]
        self._pending.append(self._client.log_batch(self._run_id, metrics=metrics, synchronous=False))

    def text(self, tag: str, text: str, step: int) -> None:
        self._client.log_text(self._run_id, text, f"{_as_key(tag)}/{step}.md")

    def images(self, tag: str, images: Mapping[str, Image.Image], step: int) -> None:
        for name, image in images.items():
            self._client.log_image(self._run_id, image, key=_as_key(f"{tag}/{name}"), step=step)

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        self._client.log_figure(self._run_id, figure, f"{_as_key(tag)}/{step}.png")

    def flush(self) -> None:
        pending, self._pending = self._pending, []
        for one in pending:
            one.wait()

    def close(self) -> None:
        self.flush()
        self._client.set_terminated(self._run_id)


def _as_key(name: str) -> str:
    """A name as MLflow allows it."""
    return re.sub(r"[^\w\-. /:]", "_", name)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
