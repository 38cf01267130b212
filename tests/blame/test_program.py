"""`vltrain blame` on a run: pages of a step, of the spike and of the worst samples, and every mistake in one line."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.attacks.inputs import sample, write_jsonl
from tests.blame.mislabelled import found_within, mislabel
from tests.html.read import Page
from tests.html.test_markup import HOSTILE
from tests.support.processes import vltrain
from vltrain.programs.blame.program import main
from vltrain.receipts.history import HISTORY, read_history

NUM_STEPS, STEP, COLOURS = 45, 42, ("red", "green", "blue", "yellow")
CELLS = re.compile(r'<td class="n">(?:<span[^>]*>)?([^<]*)')


def make_samples(folder: Path) -> set[str]:
    """150 questions about coloured squares, of which three are answered wrongly, and two with hostile texts. Returns
    the ids of the three."""
    draw, records = random.Random(0), []
    for number in range(150):
        colour, file = COLOURS[number % 4], f"{number}.png"
        left, top = draw.randrange(30), draw.randrange(30)
        picture = Image.new("RGB", (64, 64), (245, 245, 235))
        ImageDraw.Draw(picture).rectangle((left, top, left + 28, top + 28), colour)
        picture.save(folder / file)
        question = "<image>\nQuestion: what color is the shape?\nAnswer:"
        records.append(
            sample(f"s{number}", question=question, answer=colour, images=[file], metadata={"kind": "color"})
        )
    train = write_jsonl(folder / "train.jsonl", records)
    wrong = mislabel(train, 0.02)
    with train.open("a") as file:
        for number, text in enumerate(HOSTILE[:2]):
            hostile = sample(f"{text} {number}", question=f"<image>\n{text}", answer="red\u202e", images=["0.png"])
            file.write(json.dumps(hostile) + "\n")
    write_jsonl(folder / "val.jsonl", records[:4])
    return wrong


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The quickstart's model; (the run's folder, the ids of its mislabelled samples)."""
    folder = tmp_path_factory.mktemp("blamed")
    wrong = make_samples(folder)
    words = ["--recipe", "quickstart", "--ds", "zero2", "--data.source", "samples", "--data.input", str(folder)]
    words += ["--data.root", str(folder / "data"), "--data.pack_length", "512", "--data.workers", "0"]
    words += ["--train.epochs", "50", "--train.max_steps", str(NUM_STEPS), "--train.save_every_steps", "40"]
    words += ["--train.eval_every_steps", "0", "--train.eval_every_epochs", "0", "--train.precision", "fp32"]
    words += ["--optim.warmup_epochs", "1", "--train.keep_checkpoints", "3", "--output", str(folder / "run")]
    done = vltrain("train", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run", wrong


def rows(source: str) -> dict[str, list[str]]:
    """The cells of each sample's row, by its name."""
    found = re.findall(r'<tr><td><a href="#p[\d-]+">([^<]*)</a></td>(.*?)</tr>', source)
    return {name: CELLS.findall(cells) for name, cells in found}


def logged(run: Path, step: int) -> dict[str, float]:
    return json.loads((run / "log.jsonl").read_text().splitlines()[step])


def contents(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file())


def test_a_step(run, tmp_path):
    folder, _ = run
    before = contents(folder)
    done = vltrain("blame", str(folder), "--step", str(STEP), "--out", str(tmp_path / "step.html"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(folder) == before, "nothing is changed in the run's folder"
    source = (tmp_path / "step.html").read_text()
    page, told = Page(source), rows(source)
    figures = logged(folder, STEP)
    assert f"loss {figures['loss']:.4g}, gradient norm {figures['grad_norm']:.4g}" in page.text
    losses = [float(cells[1]) for cells in told.values()]
    assert losses == sorted(losses, reverse=True) and len(losses) >= 10
    assert all(float(cells[0]) == pytest.approx(float(cells[1]), rel=2e-3, abs=1e-6) for cells in told.values())
    assert sum(cells[2] != cells[1] for cells in told.values()) > len(told) / 2, "the step moved the weights"
    assert len({cells[5] for cells in told.values()}) == 2 and all(int(cells[4]) >= 2 for cells in told.values())
    counts = [int(count) for count in re.findall(r"<summary>(\d+) label token", source)]
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert mean == pytest.approx(figures["loss"], rel=1e-3)
    norms = [float(cells[3]) for cells in told.values()]
    assert max(norms) <= sum(norms) and sum(norms) >= figures["grad_norm"] * 0.99
    assert len(page.of("section", "card")) == len(told) and len(page.of("img")) == len(told)
    labels = sum(len(page.of("span", f"l{number}")) for number in range(6))
    assert labels == 3 * sum(counts) + 6 and not page.of("span", "y")


def test_the_worst(run, tmp_path):
    folder, wrong = run
    done = vltrain("blame", str(folder), "--worst", "6", "--out", str(tmp_path / "worst.html"))
    assert done.returncode == 0, done.stderr[-3000:]
    source = (tmp_path / "worst.html").read_text()
    page = Page(source)
    suspects = list(rows(source.partition("Forgotten")[0]))
    assert wrong <= set(suspects) and len(suspects) == 6, "all within the first 4%, beside two that are hard"
    assert found_within(folder, wrong, 0.04) == 1.0
    assert f"newest checkpoint, after {NUM_STEPS} steps" in page.text and page.of("span", "l5 l4 l3")
    assert all(text in page.text for text in HOSTILE[:2]), "they are hard, and shown as texts"
    assert "\u202e" not in source and "red\\u202e" in page.text


def test_without_a_checkpoint_the_history_still_ranks(run, tmp_path, monkeypatch, capsys):
    folder, wrong = run
    copy = tmp_path / "run"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    monkeypatch.chdir(tmp_path)
    assert main([str(copy)]) == 0
    source = (tmp_path / "blame-worst-20.html").read_text()
    assert wrong <= set(rows(source)) and "no checkpoint, so tokens are coloured by label alone" in Page(source).text
    assert Page(source).of("span", "y") and "loss by the checkpoint" not in source


def test_the_spike(run, tmp_path):
    folder, _ = run
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    lines = [json.loads(line) for line in (copy / "log.jsonl").read_text().splitlines()]
    lines[41]["loss"] = 1000.0
    history = read_history(copy)
    (copy / HISTORY).write_bytes((copy / HISTORY).read_bytes()[: history.end_of(41)])  # as where it stopped at 41
    (copy / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = vltrain("blame", str(copy), "--spike", "--out", str(tmp_path / "spike.html"))
    assert done.returncode == 0, done.stderr[-3000:]
    source = (tmp_path / "spike.html").read_text()
    text = Page(source).text
    assert "Step 41 of" in text and re.search(
        r"Its loss 1000 is [\d.e+]+ times the mean, [\d.]+, of the \(up to\) 50", text
    )
    assert {cells[0] for cells in rows(source).values()} == {"-"}, "the run had not recorded it yet"
    assert main([str(copy), "--step", "42", "--out", str(tmp_path / "none.html")]) == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--step", "900"], "--step: found 900, expected one that the run has done, 0 to 44"),
        (["--step", "x"], "--step: found 'x', expected a whole number of 0 or more"),
        (["--worst", "0"], "--worst: found '0', expected a whole number from 1 to 1000"),
        (["--step", "1", "--spike"], "found --step and --spike, expected one of them"),
        (["--stpe", "1"], "unknown option '--stpe', did you mean 'step'?"),
        (["--out", "there.html"], "there.html: exists already; remove it or name another file"),
        (["--packs", "nowhere"], "nowhere: the run's packs are not there; name where they are now with --packs"),
        (["another"], "found 2 folder(s), expected vltrain blame RUN"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(run, words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("there.html").write_text("mine")
    assert main([str(run[0]), *words]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("error:") == 1 and "Traceback" not in said
    assert [one.name for one in tmp_path.iterdir()] == ["there.html"] and Path("there.html").read_text() == "mine"


def test_runs_that_cannot_be_blamed(run, tmp_path, capsys):
    folder, _ = run
    copy = tmp_path / "run"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    other = tmp_path / "other"
    shutil.copytree(folder.parent / "data", other)
    packs = next(path.parent for path in other.rglob("manifest.json"))

    def refused(*words: str) -> str:
        assert main([*words, "--out", str(tmp_path / "new.html")]) == 2 and not (tmp_path / "new.html").exists()
        return capsys.readouterr().err

    assert main([str(copy), "--packs", str(packs), "--out", str(tmp_path / "moved.html")]) == 0, "packs may move"
    history = (copy / HISTORY).read_bytes()
    (copy / HISTORY).unlink()
    assert "history.bin" in refused(str(copy))
    (copy / HISTORY).write_bytes(history.replace(b'"data": "', b'"data": "0', 1))
    assert "not the packs that" in refused(str(copy))
    (copy / HISTORY).write_bytes(history[: history.index(b"\n") + 1])
    assert "holds no step yet" in refused(str(copy))
    (copy / HISTORY).write_bytes(history)
    (copy / "log.jsonl").unlink()
    assert "log.jsonl" in refused(str(copy))
    assert "no config.yaml in it" in refused(str(tmp_path))
