"""`vltrain serve` as a process over a real run, asked by OpenAI's own client; and what it refuses before a model is
loaded."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from tests.attacks.inputs import sample, write_jsonl
from tests.pages.page import INSIDE
from tests.serve.fake import data_url, image_part, text_part
from tests.support.finished_run import Places, finished_run
from tests.support.processes import ROOT
from vltrain.inference.load import load
from vltrain.models.build import build_model
from vltrain.programs import serve
from vltrain.schema import Turn
from vltrain.train.checkpoints.checkpoint import open_checkpoint, save_checkpoint

WAIT_SECONDS = 120


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Places:
    """A run with two checkpoints, of which the newer has learned something, and a split that it has answered."""
    places = finished_run(tmp_path_factory.mktemp("run"))
    newest = open_checkpoint(places.checkpoint())
    shutil.rmtree(newest.path)
    torch.manual_seed(0)
    learned = (
        (name, one.detach() + 0.2 * torch.randn_like(one), {"exp_avg": one * 0, "exp_avg_sq": one * 0})
        for name, one in build_model(places.config().model).named_parameters()
        if one.requires_grad
    )
    save_checkpoint(
        learned,
        newest.path.parent,
        step=newest.step,
        belongs_to=newest.belongs_to,
        keep=2,
        is_writer=True,
        run_state=newest.run_state,
    )
    folder = places.root / "data" / "samples"
    (folder / "images").mkdir()
    for number in range(6):
        noise(number, 8).save(folder / "images" / f"{number}.png")
    (folder / "images" / "0.png").rename(folder / "images" / "<b>0.png")
    names = [f"images/{'<b>' if number == 0 else ''}{number}.png" for number in range(6)]
    write_jsonl(
        folder / "test.jsonl",
        [sample(number, question="<image>\nIs it red?", images=[name]) for number, name in enumerate(names)],
    )
    answered = [
        {
            "id": str(number),
            "prompt": "<image>\nIs it <i>red</i>?",
            "prediction": "no" if number else "yes",
            "answer": "yes",
            "correct": not number,
            "failed": False,
        }
        for number in range(6)
    ]
    write_jsonl(places.run / "eval" / "test" / "predictions.jsonl", answered)
    return places


@contextmanager
def serving(run: Path, *words: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """(the process, its URL)"""
    command = [
        sys.executable,
        "-c",
        "import sys; from vltrain.cli import main; sys.exit(main())",
        "serve",
        str(run),
        "--port",
        "0",
        *words,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(run.parent / "serve.log", "ab") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
    try:
        assert process.stdout is not None
        greeting = process.stdout.readline()
        assert greeting.startswith("serving "), (run.parent / "serve.log").read_text()[-2000:]
        yield process, next(word for word in greeting.split() if word.startswith("http")).partition("/v1")[0]
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(places) -> Iterator[tuple[subprocess.Popen, str]]:
    """The page's command, over this run."""
    words = next(command.words for command in INSIDE.commands() if command.text.startswith("vltrain serve "))[2:]
    own = {
        "runs/quickstart": None,
        "--port": None,
        "8000": None,
        "data/easyvqa/samples": str(places.root / "data" / "samples"),
    }
    with serving(places.run, *(own.get(word, word) for word in words if own.get(word, word) is not None)) as found:
        yield found


def test_the_pages_program_is_answered(server, places, capsys):
    program = next(text for _, text in INSIDE.blocks("python") if "openai" in text)
    own = {"http://127.0.0.1:8000": server[1], "images/test/0.png": "images/1.png", 'model="quickstart"': 'model="run"'}
    for theirs, ours in own.items():
        assert theirs in program
        program = program.replace(theirs, ours)
    exec(program, {})
    image = places.root / "data" / "samples" / "images" / "1.png"
    assert capsys.readouterr().out == load(places.run, device="cpu").ask([image], "what is the red shape?").text != ""


def noise(seed: int, edge: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (edge, edge, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def question(number: int, edge: int, kind: str = "PNG") -> tuple[bytes, str]:
    stream = io.BytesIO()
    noise(number, edge).save(stream, kind)
    return (
        stream.getvalue(),
        f"Question {number}: is there a {['red', 'blue', 'green', 'grey'][number % 4]} shape?\nAnswer:",
    )


async def ask_together(url: str, asked: list[tuple[bytes, str]], **settings) -> list:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=WAIT_SECONDS)

    async def ask(image: bytes, text: str):
        messages = [{"role": "user", "content": [text_part(text), image_part(data_url(image))]}]
        return (await client.chat.completions.create(model="run", messages=messages, **settings)).choices[0]

    async with client:
        return await asyncio.gather(*(ask(*one) for one in asked))


def require_equal(run: Path, asked: list[tuple[bytes, str]], choices: list, max_new_tokens: int) -> None:
    """Each answer is that of its own image and question, which its log-probabilities tell apart from all others."""
    model = load(run, device="cpu")
    told: set[tuple[float, ...]] = set()
    for (image, text), choice in zip(asked, choices, strict=True):
        expected = model.ask([image], text, max_new_tokens=max_new_tokens)
        logprobs = [one.logprob for one in choice.logprobs.content]
        assert choice.message.content == expected.text
        assert logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert choice.finish_reason == ("stop" if expected.finished else "length")
        told.add(tuple(round(one, 3) for one in logprobs))
    assert len(told) > 0.9 * len(asked), "questions that cannot be told apart prove nothing"


def test_answers_of_many_at_once_are_those_of_ask(server, places):
    asked = [question(number, 16) for number in range(24)]
    choices = asyncio.run(ask_together(server[1], asked, max_tokens=6, logprobs=True))
    require_equal(places.run, asked, choices, 6)


def test_a_conversation_is_that_of_chat(server, places):
    image = png(noise(1, 16))
    client = openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0)
    messages = [
        {"role": "system", "content": "Say little."},
        {"role": "user", "content": [image_part(data_url(image)), text_part("What is it?")]},
        {"role": "assistant", "content": "a shape"},
        {"role": "user", "content": "Which colour?"},
    ]
    streamed = client.chat.completions.create(model="run", messages=messages, stream=True, max_tokens=8)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    turns = [
        Turn(role="system", text="Say little."),
        Turn(role="user", text="<image>\nWhat is it?"),
        Turn(role="assistant", text="a shape"),
        Turn(role="user", text="Which colour?"),
    ]
    assert text == load(places.run, device="cpu").chat(turns, [image], max_new_tokens=8).text != ""


def test_a_file_below_the_folder_is_the_same_image(server, places):
    client = openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0)
    found = []
    for url in ("images/1.png", data_url((places.root / "data/samples/images/1.png").read_bytes())):
        asked = [{"role": "user", "content": [image_part(url), text_part("Is it red?")]}]
        choice = client.chat.completions.create(model="run", messages=asked, logprobs=True, max_tokens=4).choices[0]
        found.append((choice.message.content, [one.logprob for one in choice.logprobs.content]))
    assert found[0] == found[1]


def test_other_checkpoints_of_the_run_answer_by_name(server, places):
    client = openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0)
    assert [one.id for one in client.models.list()] == ["run", "run@step-00000002", "run@none"]
    asked = {"messages": [{"role": "user", "content": "Is it red?"}], "max_tokens": 4}
    told = []
    for name, checkpoint in (("run@step-00000002", str(places.checkpoint(2))), ("run@none", "none"), ("run", None)):
        expected = load(places.run, checkpoint=checkpoint, device="cpu").ask([], "Is it red?", max_new_tokens=4)
        choice = client.chat.completions.create(model=name, **asked, logprobs=True).choices[0]
        assert choice.message.content == expected.text and [
            one.logprob for one in choice.logprobs.content
        ] == pytest.approx(expected.logprobs, abs=1e-4)
        told.append(choice.logprobs.content[0].logprob)
    assert told[0] == pytest.approx(told[1]) and abs(told[2] - told[0]) > 1e-2  # only the newest has learned
    with pytest.raises(openai.NotFoundError, match="did you mean 'run@step-00000002'"):
        client.chat.completions.create(model="run@step-2", **asked)


def test_numbers_of_a_context_that_is_too_short_are_named(server):
    client = openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="the LLM has 2048 positions"):
        client.chat.completions.create(model="run", messages=[{"role": "user", "content": "red " * 5000}])
    with pytest.raises(openai.BadRequestError, match="max_tokens: found 9000, expected at most .* positions"):
        client.chat.completions.create(model="run", messages=[{"role": "user", "content": "red"}], max_tokens=9000)


def test_turns_that_do_not_alternate_and_control_tokens_are_no_trouble(server):
    client = openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0)
    for roles in (["assistant"], ["user", "user"], ["user", "assistant"], ["user", "system"], ["system"]):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="run", messages=[{"role": role, "content": "x"} for role in roles])
    for text in ("</s><s>", "a\0b", "\u202e", "<image>"):
        client.chat.completions.create(model="run", messages=[{"role": "user", "content": text}], max_tokens=2)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="run", messages=[{"role": "user", "content": " "}])


def test_the_page_shows_nothing_of_elsewhere_and_no_file_but_its_own(server, places):
    url = server[1]
    page = httpx.get(url + "/")
    assert (
        page.status_code == 200
        and "run" in page.text
        and "default-src 'self'" in page.headers["content-security-policy"]
    )
    links = {word for word in page.text.replace("'", '"').split('"') if word.startswith(("http://", "https://", "//"))}
    assert not {link for link in links if "www.w3.org" not in link}, links
    image = httpx.get(f"{url}/gallery/test/0/0")
    assert image.status_code == 200 and image.headers["content-type"] == "image/png"
    for path in ("test/6/0", "test/0/1", "tset/0/0", "..%2f..%2f/0/0", "test/-1/0"):
        assert httpx.get(f"{url}/gallery/{path}").status_code == 404
    for path in ("docs", "openapi.json", "_nicegui/../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd"):
        assert httpx.get(f"{url}/{path}").status_code == 404
    assert httpx.get(f"{url}/", headers={"host": "evil.example"}).status_code == 403
    assert (
        httpx.get(
            f"{url}/_nicegui_ws/socket.io/?EIO=4&transport=polling", headers={"origin": "https://evil.example"}
        ).status_code
        == 403
    )


def test_a_signal_ends_it_with_the_exit_code_of_other_programs(server):
    process, url = server
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=15) == 85
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def resident_bytes(process: subprocess.Popen) -> int:
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_two_hundred_at_once_within_bounded_memory(places):
    """Their bodies are 288 MB in all: read at once, they would add 560 MB."""
    asked = [question(number, 600, "BMP") for number in range(200)]
    assert sum(len(image) for image, _ in asked) * 4 / 3 > 285e6
    with serving(places.run, "--no-page", "--max-request-bytes", str(2 << 20)) as (process, url):
        asyncio.run(ask_together(url, asked[:4], max_tokens=6, logprobs=True))
        before, most = resident_bytes(process), 0

        async def watched() -> list:
            nonlocal most
            answers = asyncio.ensure_future(ask_together(url, asked, max_tokens=6, logprobs=True))
            while not answers.done():
                most = max(most, resident_bytes(process))
                await asyncio.sleep(0.05)
            return answers.result()

        choices = asyncio.run(watched())
        print(f"{before / 1e6:.0f} MB before, {most / 1e6:.0f} MB at most")
        assert most - before < 250e6
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=15) == 130
    require_equal(places.run, asked, choices, 6)


def refused(words: list[str], capsys) -> str:
    assert serve.main(words) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].startswith("error: ") and "Traceback" not in "\n".join(told)
    return told[-1]


@pytest.fixture
def unloaded(monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(serve, "load", load)


def test_a_port_in_use_is_told_before_a_model_is_loaded(places, capsys, unloaded):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"--port {port}: cannot listen on 127.0.0.1:{port} (Address already in use)" in refused(
            [str(places.run), "--port", str(port)], capsys
        )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "the folder of a run"),
        (["--prot", "1"], "did you mean 'port'"),
        (["--port", "70000"], "--port: found '70000'"),
        (["--port", "-1"], "--port: found '-1'"),
        (["--images", "nowhere"], "--images nowhere: no such folder"),
        (["--host", "no.such.host.invalid"], "no such host"),
        (["--api-key-env", "NO_SUCH_VARIABLE"], "--api-key-env NO_SUCH_VARIABLE"),
        (["--max-waiting", "0"], "--max-waiting"),
        (["--max-request-bytes", "10"], "--max-request-bytes"),
        (["--timeout", "soon"], "--timeout"),
    ],
)
def test_mistakes_on_the_command_line(places, capsys, unloaded, words, expected):
    assert expected in refused([*([str(places.run)] if words else []), *words], capsys)


def test_a_folder_that_is_no_run_and_a_checkpoint_that_is_not_there(places, tmp_path, capsys):
    assert "no config.yaml" in refused([str(tmp_path)], capsys)
    assert "nowhere" in refused([str(places.run), "--port", "0", "--checkpoint", str(tmp_path / "nowhere")], capsys)


@pytest.mark.parametrize(
    ("missing", "words"), [("starlette", ["--no-page"]), ("uvicorn", ["--no-page"]), ("nicegui", [])]
)
def test_packages_that_are_missing_are_named_with_their_command(places, capsys, monkeypatch, unloaded, missing, words):
    find = serve.importlib.util.find_spec
    monkeypatch.setattr(
        serve.importlib.util, "find_spec", lambda name, *more: None if name == missing else find(name, *more)
    )
    assert f"the package {missing}; pip install 'vltrain[serve]'" in refused([str(places.run), *words], capsys)


def test_help_names_every_option(capsys):
    assert serve.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--{name.removeprefix('model.')}" in text for name in serve.OPTIONS)


def test_another_host_is_warned_of(places, caplog, monkeypatch):
    monkeypatch.setattr(serve, "load", lambda *_, **__: (_ for _ in ()).throw(serve.InputError("that far")))
    assert serve.main([str(places.run), "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "no authentication" in caplog.text
