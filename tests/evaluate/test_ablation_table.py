"""The table of an ablation, against one written out by hand; its files."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from vltrain.errors import InputError
from vltrain.programs.studies.table import (
    DONE,
    FAILED,
    TRAINED,
    Outcome,
    read_outcome,
    to_markdown,
    write_hparams_table,
    write_outcome,
    write_table,
)

TABLE = """
| row  | different                   | trained | % trained | accuracy | rougeL |   NAT | IMG | questions | failed | seconds | steps |
| ---- | --------------------------- | ------: | --------: | -------: | -----: | ----: | --: | --------: | -----: | ------: | ----: |
| a    | adapter.dim 8, optim.lr 0.1 |   5,000 |      2.50 |    50.00 |        | 25.00 |   – |        40 |      2 |      62 |   150 |
| b    | llm.peft.targets q v        |   5,000 |      2.50 |          |  12.50 |     – |   – |        40 |      2 |      62 |   150 |
| c\\|d | nothing                     |         |           |  waiting |        |       |     |           |        |       0 |       |
| e    | data.max_images null        |         |           |   failed |        |       |     |           |        |       3 |       |
"""


def done(measure: str, value: float, **columns: float | None) -> Outcome:
    shares = {name: {measure: share} for name, share in columns.items()}
    metrics = {
        "measure": measure,
        measure: value,
        "total": 40,
        "failed": 2,
        "columns": {**shares, "Average": {measure: value}},
    }
    return Outcome(state=DONE, seconds=61.6, parameters=200_000, trained=5_000, steps=150, metrics=metrics)


def test_the_table_is_as_by_hand():
    differences = {
        "a": {"model.adapter.dim": 8, "optim.lr": 0.1}, "b": {"model.llm.peft.targets": ("q", "v")}, "c|d": {},
        "e": {"data.max_images": None},
    }  # fmt: skip
    failed = Outcome(state=FAILED, seconds=3.2)
    outcomes = {
        "a": done("accuracy", 0.5, NAT=0.25),
        "b": done("rougeL", 0.125, IMG=None),
        "c|d": Outcome(),
        "e": failed,
    }
    assert to_markdown(differences, outcomes) == TABLE.strip()


def test_tensorboards_table_of_settings_and_figures(tmp_path):
    """Read back by its plugin's own messages."""
    outcomes = {"a": done("accuracy", 0.5, NAT=0.25), "b": done("accuracy", 0.75), "c": Outcome()}
    settings = {
        "a": {"model.adapter.dim": 8, "model.llm.peft.targets": ("q", "v"), "model.tune": "adapters"},
        "b": {"model.adapter.dim": 16, "model.llm.peft.targets": ("q",), "model.tune": "full"},
        "c": {},
    }
    for _ in range(2):  # written anew after each row
        write_hparams_table(tmp_path, settings, {row: {None: outcome} for row, outcome in outcomes.items()})
    assert sorted(path.name for path in (tmp_path / "hparams").iterdir()) == ["a", "b"]
    for row, dim, targets, accuracy in (("a", 8.0, "q v", 0.5), ("b", 16.0, "q", 0.75)):
        events = EventAccumulator(str(tmp_path / "hparams" / row)).Reload()
        content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
        session = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
        assert session.hparams["model.adapter.dim"].number_value == dim
        assert session.hparams["model.llm.peft.targets"].string_value == targets
        assert [event.value for event in events.Scalars("accuracy")] == [accuracy]
        assert [event.value for event in events.Scalars("trained parameters")] == [5000.0]
        assert ("accuracy of NAT" in events.Tags()["scalars"]) == (row == "a")


def test_its_files_say_the_same_without_the_settings_of_each_run(tmp_path):
    outcome = done("accuracy", 0.5, NAT=0.25)
    outcome.made_with = {"optim.lr": 0.5}
    text = write_table(tmp_path, {"a": {"model.adapter.dim": 8}}, {"a": {None: outcome}})
    assert (tmp_path / "table.md").read_text() == text + "\n"
    (row,) = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert (row["row"], row["settings"], row["trained"], row["metrics"]["failed"]) == (
        "a",
        {"model.adapter.dim": 8},
        5_000,
        2,
    )
    assert "made_with" not in row


SEEDED = """
| row | different | trained | % trained | accuracy |    sd | ± 95% |  seeds |   NAT |   IMG | questions | failed | seconds | steps |
| --- | --------- | ------: | --------: | -------: | ----: | ----: | -----: | ----: | ----: | --------: | -----: | ------: | ----: |
| a   | nothing   |   5,000 |      2.50 |    60.00 | 10.00 | 24.84 |      3 | 35.00 |     – |        40 |      6 |     185 |   150 |
| b   | nothing   |   5,000 |      2.50 |    20.00 |     – |     – | 1 of 3 |     – | 10.00 |        40 |      2 |     123 |   150 |
| c   | nothing   |         |           |   failed |       |       | 0 of 3 |       |       |           |        |       3 |       |
"""


def test_the_table_of_several_seeds_is_as_by_hand(tmp_path):
    """sd of 0.5, 0.6, 0.7 is 0.1; its interval 4.3027 * 0.1 / sqrt(3)."""
    failed = Outcome(state=FAILED, seconds=3.2)
    runs = {
        "a": {seed: done("accuracy", 0.5 + 0.1 * seed, NAT=0.25 + 0.1 * seed) for seed in range(3)},
        "b": {0: done("accuracy", 0.2, IMG=0.1), 1: Outcome(state=TRAINED, seconds=61.6), 2: Outcome()},
        "c": {0: failed, 1: Outcome(), 2: Outcome()},
    }
    assert write_table(tmp_path, dict.fromkeys(runs, {}), runs) == SEEDED.strip()
    a, _, c = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [a["seeds"][seed]["metrics"]["accuracy"] for seed in "012"] == [0.5, 0.6, 0.7] and a["done"] == 3
    assert a["spread"]["sd"] == pytest.approx(0.1) and a["metrics"]["accuracy"] == pytest.approx(0.6)
    assert c["spread"] is None and (c["state"], c["seeds"]["1"]["state"]) == ("failed", "waiting")
    write_hparams_table(tmp_path, {"a": {"optim.lr": 0.5}, "c": {}}, runs)
    assert sorted(path.name for path in (tmp_path / "hparams").iterdir()) == ["a-seed-0", "a-seed-1", "a-seed-2"]
    events = EventAccumulator(str(tmp_path / "hparams" / "a-seed-2")).Reload()
    found = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    assert found["accuracy"] == pytest.approx(0.7) and found["mean accuracy"] == pytest.approx(0.6)
    assert found["95% interval of accuracy"] == pytest.approx(0.2484, abs=1e-4)


def test_an_outcome_comes_back_from_its_file(tmp_path):
    assert read_outcome(tmp_path) == Outcome()
    write_outcome(tmp_path, done("accuracy", 0.5, NAT=0.25))
    assert read_outcome(tmp_path) == done("accuracy", 0.5, NAT=0.25)


@pytest.mark.parametrize("text", ["", "[1]", '{"state": "done", "no_such": 1}'])
def test_a_damaged_outcome_is_named(tmp_path, text):
    (tmp_path / "row.json").write_text(text)
    with pytest.raises(InputError, match="row.json"):
        read_outcome(tmp_path)
