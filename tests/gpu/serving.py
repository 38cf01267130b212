"""`vltrain serve` on this device, asked by a dozen clients at once, half of them streamed: answers are the model's own,
and SIGTERM ends it."""

from __future__ import annotations

import base64
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.gpu.part import Findings, run_part
from tests.gpu.runs import tuned_run
from tests.support.processes import ROOT
from vltrain.distributed.preemption import EXIT_REQUEUE
from vltrain.inference import load
from vltrain.schema import Sample

CLIENTS, REQUESTS, EMULATED = 12, 120, 12


def find(findings: Findings) -> None:
    run = tuned_run(findings)
    model = load(run, device=findings.device)
    folder = Path(model.config.data.root) / "samples"
    lines = (folder / "test.jsonl").read_text().splitlines()[: EMULATED if findings.emulate else REQUESTS]
    samples = [Sample.from_json(json.loads(line), "") for line in lines]
    expected = [model.chat(one.turns[:-1], [folder / name for name in one.images]).text for one in samples]
    with _serving(findings, run, folder) as (process, url), httpx.Client(base_url=url, timeout=120) as client:
        for clients in (1, CLIENTS):
            began = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                found = list(
                    pool.map(
                        lambda number: _ask(client, run.name, samples[number], folder, number), range(len(samples))
                    )
                )
            whole = time.perf_counter() - began
            seconds = sorted(one[1] for one in found)
            wrong = sum(one[0] != text for one, text in zip(found, expected, strict=True))
            findings.row(
                "vltrain serve",
                clients=clients,
                requests=len(found),
                requests_per_second=len(found) / whole,
                median_ms=1e3 * statistics.median(seconds),
                slowest_ms=1e3 * seconds[-1],
                other_answers_than_the_models=wrong,
            )
            findings.require(not wrong, f"{clients} client(s): {wrong} of {len(found)} answers are not the model's own")
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
        findings.require(code == EXIT_REQUEUE, f"SIGTERM: ended with {code}, expected {EXIT_REQUEUE}")


@contextmanager
def _serving(findings: Findings, run: Path, images: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    words = ["serve", str(run), "--port", "0", "--images", str(images), "--device", str(findings.device), "--no-page"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    log = findings.folder / "serve.log"
    with log.open("ab") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "vltrain", *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=told,
            text=True,
        )
    try:
        assert process.stdout is not None
        greeting = process.stdout.readline()
        if not greeting.startswith("serving "):
            raise RuntimeError(f"vltrain serve did not start: {log.read_text(errors='replace')[-1500:]}")
        yield process, next(word for word in greeting.split() if word.startswith("http")).partition("/v1")[0]
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _ask(client: httpx.Client, model: str, sample: Sample, folder: Path, number: int) -> tuple[str, float]:
    """The answer and its seconds; every second request is streamed, every third image is a data URL."""
    image = sample.images[0]
    url = (
        f"data:image/png;base64,{base64.b64encode((folder / image).read_bytes()).decode()}"
        if number % 3 == 0
        else image
    )
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": sample.metadata["question"]}]
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "stream": number % 2 == 1,
    }
    began = time.perf_counter()
    answer = client.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    if not body["stream"]:
        return answer.json()["choices"][0]["message"]["content"], time.perf_counter() - began
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    pieces = [json.loads(one)["choices"] for one in events if one != "[DONE]"]
    return "".join(one[0]["delta"].get("content") or "" for one in pieces if one), time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(run_part("serving", find, __doc__))
