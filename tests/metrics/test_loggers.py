"""Loggers of metrics: what each keeps, read back by its own library, and that none ends a run."""

import json
import logging
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.files.test_writers import fill
from vltrain.config.recipe import build_config, read_recipe
from vltrain.errors import InputError
from vltrain.metrics.base import RunContext
from vltrain.metrics.loggers import Loggers, open_loggers
from vltrain.metrics.monitor import Monitor
from vltrain.metrics.table import LOGGERS, require_loggers
from vltrain.metrics.tensorboard import TensorBoardLogger
from vltrain.models.flops import Flops

PICTURES = {name: Image.new("RGB", (6, 4), colour) for name, colour in (("q7", "#ff0000"), ("q9", "#00ff00"))}


def context(folder: Path, first_step: int | None = None) -> RunContext:
    return RunContext(folder=folder, settings={"train": {"epochs": 2}, "output": "x"}, first_step=first_step)


def say_everything(loggers) -> None:
    loggers.scalars({"train/loss": 1.5, "train/lr": 0.1}, 3)
    loggers.scalars({"train/loss": 0.5}, 7)
    loggers.scalars({"eval/val/accuracy": 0.25}, 5)  # an evaluation of an earlier checkpoint
    loggers.text("eval/val/table", "| a |", 5)
    loggers.images("eval/val", PICTURES, 5)
    figure = Figure()
    figure.add_subplot().plot([1, 2])
    loggers.figure("adalora/ranks", figure, 5)
    loggers.flush()
    loggers.close()


def test_tensorboard(tmp_path):
    say_everything(open_loggers(["tensorboard"], context(tmp_path)))
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 1.5), (7, 0.5)]
    assert events.Scalars("eval/val/accuracy")[0].step == 5
    assert {"eval/val/q7", "eval/val/q9", "adalora/ranks"} == set(events.Tags()["images"])
    assert (events.Images("eval/val/q7")[0].width, events.Images("eval/val/q7")[0].height) == (6, 4)
    assert events.Tensors("eval/val/table/text_summary")[0].tensor_proto.string_val == [b"| a |"]
    again = open_loggers(["tensorboard"], context(tmp_path, first_step=7))
    again.scalars({"train/loss": 0.75}, 7)
    again.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 1.5), (7, 0.75)]


def test_tensorboard_on_a_full_disk(small_disk, capfd, caplog):
    loggers = Loggers({"tensorboard": TensorBoardLogger(context(small_disk))})
    loggers.scalars({"a": 1.0}, 0)
    loggers.flush()
    fill(small_disk)
    for number in range(50):
        loggers.text("a", "x" * 10_000, number)
        loggers.flush()
    with suppress(InputError):
        loggers.close()
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "tensorboard: cannot be written (No space left" in said[0]
    assert "Traceback" not in capfd.readouterr().err


def test_a_place_that_cannot_be_written_ends_the_run_before_it_begins():
    with pytest.raises(InputError, match="written"):
        open_loggers(["tensorboard"], context(Path("/dev/null/x")))


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log (W&B's offline file: 7 bytes of its own in front): blocks of 32 KiB, chunks of checksum,
    length, and type: whole, first, middle, last."""
    place, parts = 7, []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def finished_records(path: Path) -> list:
    """Those of a life that has ended, which its service process may still be writing."""
    from wandb.proto import wandb_internal_pb2

    deadline = time.monotonic() + 60
    while True:
        records = [wandb_internal_pb2.Record.FromString(data) for data in log_records(path.read_bytes())]
        if any(record.HasField("exit") for record in records) or time.monotonic() > deadline:
            return records
        time.sleep(0.1)


def test_wandb_without_network(tmp_path, monkeypatch):
    """Read back from the file that `wandb sync` uploads."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    threads = threading.active_count()
    say_everything(open_loggers(["wandb"], context(tmp_path)))
    time.sleep(1.1)  # W&B names a life's folder by the second
    again = open_loggers(["wandb"], context(tmp_path, first_step=7))
    again.scalars({"train/loss": 0.75}, 7)
    again.close()
    rows, ids, media = [], set(), []
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for record in finished_records(path):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                settings = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                assert settings["train"] == {"epochs": 2}
            if record.HasField("history"):
                row = {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                rows.append({name: value for name, value in row.items() if not name.startswith("_")})
        media += [one.name for one in path.parent.rglob("media/**/*") if one.is_file()]
    assert ids == {(tmp_path / "wandb" / "run_id").read_text()}, "a run that goes on is the same one there"
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [(3, 1.5), (7, 0.5), (7, 0.75)]
    assert {"step": 5, "eval/val/accuracy": 0.25} in rows
    assert sum(name.endswith(".png") for name in media) == 3 and sum(name.endswith(".html") for name in media) == 1
    assert threading.active_count() <= threads + 2


@pytest.mark.slow
def test_wandb_whose_server_is_gone(tmp_path, monkeypatch, caplog):
    for name, value in {"API_KEY": "0" * 40, "BASE_URL": "http://127.0.0.1:9", "INIT_TIMEOUT": "5"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    loggers = open_loggers(["wandb", "tensorboard"], context(tmp_path))
    say_everything(loggers)
    assert [record.message.partition(" (")[0] for record in caplog.records if record.levelno == logging.WARNING] == [
        "train.loggers: wandb failed"
    ]
    assert list((tmp_path / "tensorboard").iterdir())


def mlflow_store(folder: Path):
    from mlflow import MlflowClient

    return MlflowClient(f"file:{folder}")


def test_mlflow_without_a_server(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    say_everything(open_loggers(["mlflow"], context(tmp_path / "run")))
    again = open_loggers(["mlflow"], context(tmp_path / "run", first_step=7))
    again.scalars({"train/loss": 0.75, "eval/odd|name": 1.0}, 7)
    again.close()
    client = mlflow_store(tmp_path / "store")
    (found,) = client.search_runs([client.get_experiment_by_name("vltrain").experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    assert found.data.params == {"train.epochs": "2", "output": "x"}
    assert {"eval/odd_name", "eval/val/accuracy", "train/lr"} <= found.data.metrics.keys()
    history = client.get_metric_history(found.info.run_id, "train/loss")  # in no order of its own
    losses = sorted((one.step, one.value) for one in history)
    assert losses == [(3, 1.5), (7, 0.5), (7, 0.75)]
    kept = {path.name for path in (tmp_path / "store").rglob("artifacts/**/*") if path.is_file()}
    assert "5.md" in kept and "5.png" in kept and sum(name.endswith(".png") for name in kept) == 3


@pytest.mark.slow
def test_mlflow_without_an_address_keeps_a_database_in_the_run(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    say_everything(open_loggers(["mlflow"], context(tmp_path)))
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db", f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("vltrain").experiment_id])
    assert found.data.metrics["train/loss"] == 0.5
    assert len(list((tmp_path / "mlflow" / "artifacts").rglob("*.png"))) == 3


class Failing:
    """Works once, then raises what libraries raise."""

    package, install = "json", "pip install json"

    def __init__(self, run):
        self.calls = 0

    def _fail(self, *_):
        self.calls += 1
        if self.calls > 1:
            raise ConnectionError("the network is gone\nand a page of details")

    scalars = text = images = figure = _fail

    def flush(self):
        self._fail()

    def close(self):
        self._fail()


class Kept(Failing):
    def _fail(self, *arguments):
        self.calls += 1

    scalars = text = images = figure = _fail


def test_a_logger_that_raises_ends_nothing_and_says_so_once(tmp_path, caplog):
    """Through the monitor, as a run reports."""
    failing, kept = Failing(None), Kept(None)
    monitor = Monitor(
        tmp_path,
        Loggers({"failing": failing, "kept": kept}),
        active=True,
        first_step=0,
        num_steps=3,
        log_every_steps=1,
        flops=Flops(per_token=1.0, per_pair=1.0, per_image=1.0, per_label=1.0),
        peak_flops=1.0,
    )
    for step in range(3):
        monitor.loss(step, 1.0, 1.0, 0.1)
    monitor.pause()
    monitor.close()
    assert failing.calls == 2 and kept.calls == 5
    (said,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "failing failed (the network is gone)" in said and "details" not in said
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def test_a_logger_that_cannot_be_opened_is_left_out(tmp_path, monkeypatch, caplog):
    class Unreachable(Failing):
        def __init__(self, run):
            raise TimeoutError("no answer")

    monkeypatch.setitem(LOGGERS, "unreachable", Unreachable)
    loggers = open_loggers(["unreachable", "tensorboard"], context(tmp_path))
    loggers.scalars({"a": 1.0}, 0)
    loggers.close()
    assert "unreachable failed (no answer)" in caplog.text and list((tmp_path / "tensorboard").iterdir())


def test_what_ends_a_run_is_not_taken_for_a_failing_logger():
    class Stopping(Failing):
        def scalars(self, values, step):
            raise SystemExit(85)

    with pytest.raises(SystemExit):
        Loggers({"stopping": Stopping(None)}).scalars({}, 0)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tensorbord"], "train.loggers: unknown logger 'tensorbord'; did you mean 'tensorboard'"),
        (["wandb", "wandb"], "'wandb' is there twice"),
        (["absent"], "absent needs the package no_such_package, which is not installed: pip install it;"),
    ],
)
def test_mistakes_are_found_before_training(names, message, monkeypatch):
    class Absent(Failing):
        package, install = "no_such_package", "pip install it"

    monkeypatch.setitem(LOGGERS, "absent", Absent)
    with pytest.raises(InputError) as refused:
        require_loggers(names)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("line", "names"),
    [("{}", ("tensorboard",)), ("{loggers: []}", ()), ("{loggers: [wandb, mlflow]}", ("wandb", "mlflow"))],
)
def test_the_recipe_names_them(line, names, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"train: {line}\n")
    assert build_config(read_recipe(tmp_path / "recipe.yaml")).train.loggers == names
