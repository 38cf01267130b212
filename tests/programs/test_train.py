"""The main job as a user starts it: DeepSpeed's launcher, two ranks, real images and questions; then stopped, resumed,
evaluated."""

import json
import re

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from tests.support.processes import deepspeed, on_ranks, vltrain

pytest.importorskip("easy_vqa", reason="the easy-vqa package has the images; install the extra `test`")
NUM_STEPS = 30


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The default recipe, cut short. Also what it printed."""
    folder = tmp_path_factory.mktemp("main-job")
    words = [
        "--data.root",
        str(folder / "data"),
        "--output",
        str(folder / "run"),
        "--train.max_steps",
        str(NUM_STEPS),
        "--train.save_every_steps",
        "12",
    ]
    words += ["--eval.max_samples", "100", "--train.eval_every_steps", "20"]
    done = deepspeed("launch/train_mmt.py", "--ds", "ds_configs/zero2.json", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run", words, done


def test_it_learns(trained):
    folder, _, _ = trained
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(losses) == NUM_STEPS
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_the_run_folder_says_what_it_was_made_of(trained):
    folder, _, done = trained
    facts = json.loads((folder / "run.json").read_text())
    assert facts["packages"].keys() >= {"torch", "deepspeed", "transformers"} and facts["ranks"] == 2
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?|unknown", facts["commit"])
    assert (
        facts["parameters"]["neck"] == {"total": 33_024, "trainable": 33_024}
        and facts["parameters"]["llm"]["trainable"] == 0
    )
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["max_steps"] == NUM_STEPS
    trained = sum(count["trainable"] for count in facts["parameters"].values())
    zero = json.loads((folder / "ds_config.json").read_text())["zero_optimization"]
    assert zero["stage"] == 2 and zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == trained + trained % 2
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "latest",
        "step-00000024",
        "step-00000030",
    ]
    assert [
        (done.stderr + done.stdout).count(said)
        for said in ("attention of packed rows:", "norms, rotary embedding and SwiGLU")
    ] == [1, 1]
    fill = float(re.search(r"([\d.]+)% full", done.stderr + done.stdout).group(1))
    assert fill >= 99.95


def test_its_receipt_proves_it(trained):
    done = vltrain("check", "resume", str(trained[0]))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"ok      chain: {NUM_STEPS} of {NUM_STEPS} steps, each once and in order" in done.stdout


def test_a_step_is_replayed_in_one_process(trained):
    """Two ranks trained it, one does it again, from the checkpoint four steps before: the mean is what the run has
    logged."""
    folder, _, _ = trained
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file())
    done = vltrain("check", "replay", str(folder), "--step", "28")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [
        line.split(maxsplit=2) for line in done.stdout.splitlines() if re.match(r"\s+[\d.e+-]+\s+\d+\s+train/", line)
    ]
    losses, counts = [float(row[0]) for row in rows], [int(row[1]) for row in rows]
    logged = json.loads((folder / "log.jsonl").read_text().splitlines()[28])["loss"]
    assert losses == sorted(losses, reverse=True) and f"step 28: {len(rows)} samples, 0 with a loss" in done.stdout
    assert sum(loss * count for loss, count in zip(losses, counts)) / sum(counts) == pytest.approx(logged, rel=1e-4)
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()) == before


def test_tensorboard_shows_the_promised_curves_and_pictures(trained):
    folder, _, _ = trained
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    promised = {
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "speed/useful_tokens_per_second",
        "speed/samples_per_second",
        "speed/padding_share",
        "speed/waiting_for_data_share",
        "speed/mfu",
        "memory/peak_gib",
        "eval/val/accuracy",
    }
    assert promised <= scalars
    assert [event.step for event in events.Scalars("train/loss")] == list(range(NUM_STEPS))
    assert [event.step for event in events.Scalars("eval/val/accuracy")] == [20, NUM_STEPS]
    assert all(0 < event.value < 1.5 for event in events.Scalars("speed/mfu"))
    assert all(event.value == 0 for event in events.Scalars("speed/padding_share"))
    pictures = [tag for tag in events.Tags()["images"] if tag.startswith("eval/val/")]
    assert len(pictures) >= 4
    assert all([event.step for event in events.Images(tag)] == [20, NUM_STEPS] for tag in pictures)
    assert [event.step for event in events.Images("adapters/norm_by_layer")] == [20, NUM_STEPS]
    assert events.Scalars("data/epoch")[-1].step == NUM_STEPS - 1 and {"adapters/norm/adapter"} <= scalars


def test_each_curve_has_one_place_in_the_layout(trained):
    """Groups of charts, read back as TensorBoard does."""
    folder, _, _ = trained
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    titles = [category.title for category in layout.category]
    assert titles == ["loss and accuracy", "speed", "data", "memory", "adapters", "checks"]
    patterns = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    for tag in events.Tags()["scalars"]:
        assert sum(re.match(pattern, tag) is not None for pattern in patterns) == 1, tag


def test_a_finished_run_is_left_as_it_is(trained):
    folder, words, _ = trained
    before = {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()}
    for again in on_ranks("launch/train_mmt.py", "--ds", "ds_configs/zero2.json", *words):
        assert again.returncode == 0, again.stderr[-3000:]
    assert re.search("model.llm.attention: (sdpa|tiled), as the run began", (folder / "run.log").read_text())
    assert {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()} == before
    assert len((folder / "log.jsonl").read_text().splitlines()) == NUM_STEPS


def test_another_recipe_does_not_go_on_from_it(trained):
    _, words, _ = trained
    ended = on_ranks("launch/train_mmt.py", "--ds", "ds_configs/zero2.json", *words, "--optim.lr", "0.5")
    refused = next(done for done in ended if done.returncode == 2)  # the other may be ended by then, as by a launcher
    assert "optim.lr was 0.002, is 0.5" in refused.stderr and not any("Traceback" in done.stderr for done in ended)


def test_evaluation_by_free_generation(trained):
    folder, _, _ = trained
    done, other = on_ranks("launch/evaluate.py", str(folder), "--split", "val", "--eval.max_samples", "300")
    assert (done.returncode, other.returncode) == (0, 0), done.stderr[-3000:]
    metrics = json.loads((folder / "eval" / "val" / "metrics.json").read_text())
    assert metrics["total"] == 300 and f"accuracy={metrics['accuracy']:.4f} (300 questions)" in done.stdout
    assert metrics["accuracy"] > 0.55  # always answering the commoner word gives less than 0.4


def test_a_loss_that_is_no_number_stops_the_run_and_names_samples(trained, tmp_path):
    folder, words, _ = trained
    changed = [
        *words,
        "--output",
        str(tmp_path / "run"),
        "--optim.lr",
        "10",
        "--optim.weight_decay",
        "10",
        "--optim.warmup_epochs",
        "0",
    ]
    stopped, _ = on_ranks("launch/train_mmt.py", "--ds", "ds_configs/zero2.json", *changed)
    assert stopped.returncode == 2
    assert re.search(r"error: step \d+: loss [^;]*\b(nan|inf)\b.*sample\(s\) train/", stopped.stderr), stopped.stderr[
        -2000:
    ]
    assert "Traceback" not in stopped.stderr
    assert list((tmp_path / "run").glob("checkpoints/step-*")) == []
