"""`vltrain ask` as a user types it: answers on stdout, conversations by line, and one line for every mistake."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import subprocess
import sys

import pytest

from tests.support.answering_run import KINDS, answering_run, asked
from vltrain.config.stages import STAGES_FILE
from vltrain.files.strict_json import read_json
from vltrain.inference import load
from vltrain.programs.ask import main
from vltrain.train.checkpoints.checkpoint import newest_checkpoint
from vltrain.train.run.adapters_folder import write_adapters

NEW_TOKENS = 8


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {kind: answering_run(kind, tmp_path_factory.mktemp(kind), eval__max_new_tokens=NEW_TOKENS) for kind in KINDS}


@pytest.fixture(scope="module")
def asks(runs):
    """By kind: the run, its answers, and the words that name a sample's images and question."""
    models = {kind: load(run.folder) for kind, run in runs.items()}

    def words(sample, run):
        return [
            str(run.folder),
            *(word for path in run.paths(sample) for word in ("--image", str(path))),
            sample.turns[0].text,
        ]

    return {kind: (run, models[kind], words) for kind, run in runs.items()}


def refused(words: list[str], capsys) -> str:
    """The one line of a mistake."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_stands_alone_on_stdout(kind, asks, capsys):
    run, model, words = asks[kind]
    for sample in run.samples[:3]:
        assert main(words(sample, run)) == 0
        assert capsys.readouterr().out == model.chat(asked(sample), run.paths(sample)).text + "\n"


def test_json_says_tokens_and_log_probabilities_of_both_models(asks, capsys):
    run, model, words = asks["mmt"]
    sample = run.samples[0]
    assert main([*words(sample, run), "--json", "--compare", "--max_new_tokens", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    answer, untuned = (
        one.chat(asked(sample), run.paths(sample), max_new_tokens=3)
        for one in (model, load(run.folder, checkpoint="none"))
    )
    for record, expected in ((found, answer), (found["untuned"], untuned)):
        assert {name: record[name] for name in vars(expected)} == vars(expected)
    assert untuned != answer and found["checkpoint"]["step"] == 3
    assert main([*words(sample, run), "--compare"]) == 0
    told = capsys.readouterr().out
    assert (
        told == f"tuned:   {model.chat(asked(sample), run.paths(sample)).text}\nuntuned: "
        f"{load(run.folder, checkpoint='none').chat(asked(sample), run.paths(sample)).text}\n"
    )


def test_sampling_and_weights_are_the_command_lines(asks, capsys, tmp_path):
    run, model, words = asks["mmt"]
    sample = run.samples[0]
    assert main([*words(sample, run), "--temperature", "1.5", "--top-p", "0.9", "--seed", "3"]) == 0
    assert (
        capsys.readouterr().out
        == model.chat(asked(sample), run.paths(sample), temperature=1.5, top_p=0.9, seed=3).text + "\n"
    )
    folder = tmp_path / "adapters"
    folder.mkdir()
    write_adapters(folder, run.config, newest_checkpoint(run.folder / "checkpoints"), run.folder)
    bare = tmp_path / "bare"  # a run's recipe without weights
    bare.mkdir()
    shutil.copy(run.folder / "config.yaml", bare)
    expected = model.chat(asked(sample), run.paths(sample)).text + "\n"
    for place, more in (
        (bare, ["--adapters", str(folder)]),
        (folder, []),
        (bare, ["--checkpoint", str(run.folder / "checkpoints" / "step-00000003")]),
    ):
        assert main([str(place), *words(sample, run)[1:], *more]) == 0
        assert capsys.readouterr().out == expected


def test_of_a_run_in_stages_the_last_answers(asks, capsys, tmp_path):
    run, model, words = asks["mmt"]
    sample = run.samples[0]
    shutil.copytree(run.folder, tmp_path / "tune")
    (tmp_path / STAGES_FILE).write_text(json.dumps({"stages": ["neck", "tune"]}))
    assert main([str(tmp_path), *words(sample, run)[1:]]) == 0
    assert capsys.readouterr().out == model.chat(asked(sample), run.paths(sample)).text + "\n"


def talk(lines: str, words: list[str], monkeypatch, capsys) -> tuple[int, list[str], str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code = main(words)
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def test_a_conversation_reads_what_was_said_before(asks, monkeypatch, capsys):
    run, model, _ = asks["mmt"]
    image = run.paths(next(one for one in run.samples if one.images))[0]
    code, said, _ = talk(
        f"/image {image}\nwhich color is it ?\nand which shape ?\n/clear\nand which shape ?\n/quit\nnot asked\n",
        [str(run.folder)],
        monkeypatch,
        capsys,
    )
    first = model.chat([model.question("which color is it ?", 1)], [image])
    second = [
        model.question("which color is it ?", 1),
        type(asked(run.samples[0])[0])(role="assistant", text=first.text),
        model.question("and which shape ?", 0),
    ]
    expected = [first.text, model.chat(second, [image]).text, model.ask([], "and which shape ?").text]
    assert code == 0 and said == "\n".join(expected).splitlines()
    assert len(set(expected)) == 3


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_where_questions_stand_alone_the_image_stays_until_another_is_named(kind, asks, monkeypatch, capsys):
    run, model, _ = asks[kind]
    one, two = (run.images / f"{name}.png" for name in ("one", "two"))
    code, said, told = talk(
        f"/image {one}\nwhat color ?\nwhat shape ?\n/image {two}\nwhat color ?\n/image {one}\n/image "
        f"{two}\nwhat color ?",
        [str(run.folder)],
        monkeypatch,
        capsys,
    )
    expected = [
        model.ask(images, question).text
        for images, question in (
            ([one], "what color ?"),
            ([one], "what shape ?"),
            ([two], "what color ?"),
            ([one, two], "what color ?"),
        )
    ]
    assert (code, said) == (0, expected) and "each question stands alone" in told


def test_the_first_mistake_in_lines_that_nobody_typed_ends_it(asks, monkeypatch, capsys):
    run = asks["mmt"][0]
    for line, hint in (
        ("/imge x", "did you mean '/image'"),
        ("/image", "expected /image FILE"),
        ("/image none.png", "no such file"),
    ):
        code, said, told = talk(f"{line}\nwhat ?\n", [str(run.folder)], monkeypatch, capsys)
        assert (code, said) == (2, []) and hint in told


def test_a_terminal_goes_on_after_a_mistake(asks):
    """As a user sees it: through a terminal of its own."""
    run, model, _ = asks["mmt"]
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "vltrain", "ask", str(run.folder)],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.write(ours, b"/imge\nwhich color is it ?\n\x04")
    said, told = child.communicate(timeout=120)
    os.close(ours), os.close(theirs)
    assert child.returncode == 0 and model.ask([], "which color is it ?").text in said
    assert "unknown command '/imge'" in told


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--image", "none.png"], "--image none.png: no such file"),
        (["--image", "{run}"], "not a regular file"),
        (["--image", "{run}/config.yaml"], "config.yaml: not a readable image"),
        (["--checkpoint", "best"], "no best checkpoint"),
        (["--checkpoint", "{run}/step-9"], "step-9: "),
        (["--adapters", "{run}"], "no checkpoint.json in it"),
        (["--adapters", "{run}", "--checkpoint", "best"], "both say which weights answer"),
        (["--bits", "3"], "model.bits: found 3"),
        (["--bits", "many"], "--bits: found 'many'"),
        (["--device", "tpu"], "device: found 'tpu'"),
        (["--temperature", "warm"], "--temperature: found 'warm'"),
        (["--top-p", "2"], "eval.top_p: found 2.0"),
        (["--compare", "--checkpoint", "none"], "--compare: has no effect"),
        (["--tempersture", "1"], "did you mean 'temperature'"),
        (["more", "words"], "put the question in quotes"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(more, told, asks, capsys):
    run = asks["mmt"][0]
    assert told in refused(
        [str(run.folder), "which ?", *(word.replace("{run}", str(run.folder)) for word in more)], capsys
    )


def test_what_is_no_run_or_has_no_weights_or_no_question(asks, capsys, tmp_path):
    run = asks["mmt"][0]
    assert "expected the folder of a run" in refused([str(tmp_path), "which ?"], capsys)
    shutil.copy(run.folder / "config.yaml", tmp_path)
    assert "no complete checkpoint in it" in refused([str(tmp_path), "which ?"], capsys)
    assert "--json: needs a question" in refused([str(run.folder), "--json"], capsys)
    assert "expected vltrain ask RUN" in refused([], capsys)
    for kind in ("llama", "t5"):
        assert "needs an image" in refused([str(asks[kind][0].folder), "which ?"], capsys)


def test_a_base_that_changed_since_training_is_refused(capsys, tmp_path):
    run = answering_run("llama", tmp_path)
    file = next(tmp_path.glob("tokenizers/llama/tokenizer.json"))
    record = read_json(file)
    record["model"]["vocab"]["star"], record["model"]["vocab"]["heart"] = (
        record["model"]["vocab"]["heart"],
        record["model"]["vocab"]["star"],
    )
    file.write_text(json.dumps(record))
    told = refused([str(run.folder), "--image", str(run.images / "one.png"), "which ?"], capsys)
    assert "these weights were trained in another model" in told and "tokenizer.json has changed" in told


def test_help_says_every_option(capsys):
    from vltrain.programs.ask import OPTIONS

    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"--{name}" in told for name in OPTIONS if name != "help")


def test_asking_loads_nothing_that_trains():
    code = (
        "import sys, vltrain.launching.terminal, vltrain.inference; print([name for name in ('deepspeed', "
        "'tensorboard', 'datasets', 'matplotlib', 'vltrain.train.zero.engine') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
