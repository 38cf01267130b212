"""`bash tests/gpu.sh`: starts the parts one after another, each in a process with a time limit, and writes the page."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.measure import tell
from tests.gpu.page import write_page

PARTS = {
    "doctor": "what the machine has, each optional package run once",
    "kernels": "kernels, losses and attention against float64, every dtype and size",
    "equivalence": "ZeRO 0 to 3 in fp32 and bf16 beside a plain PyTorch loop",
    "resume": "kill -9 and --resume auto: the run that nobody killed, bit for bit",
    "quickstart": "the quickstart, trained and evaluated",
    "asking": "vltrain ask: streamed, of several images, in 4, 8 and 16 bits, beside a CPU",
    "evaluating": "vltrain evaluate: precisions and batch sizes beside each other",
    "exporting": "vltrain export and check export, every format of the architecture",
    "stages": "a recipe in stages: trained, evaluated, checked, found done",
    "serving": "vltrain serve: a dozen clients at once",
    "architectures": "each architecture beside the CPU: answers, ranking, captions; InstructBLIPs trained",
    "stock": "vision-language models of transformers: packed rows beside each sample alone on the CPU; ZeRO 0, 2, 3",
    "stock_runs": "such models with their processors, by the programs: ways of training, answers, exports",
    "bits": "frozen weights in 4 and 8 bits: products, and runs",
    "seven_b": "the 7B recipe at full size, random weights: tokens a second, utilisation, memory beside the plan's",
    "trainers": "Trainer and TRL beside us, SmolLM2-135M and a LLaMA of 1B",
    "stock_trainers": "TRL's trainer of vision-language models beside us, SmolVLM-256M and 500M",
    "speed": "the fused kernel beside torch and the bandwidth's floor; ways of attention beside each other",
}
EMULATED = (
    "doctor",
    "kernels",
    "equivalence",
    "bits",
    "seven_b",
    "asking",
    "evaluating",
    "exporting",
    "stages",
    "serving",
    "architectures",
    "stock",
    "stock_runs",
    "stock_trainers",
)
LIMIT_SECONDS = 600
ROOT = Path(__file__).parents[2]


def main() -> int:
    """Returns 0 where all parts passed, 1 where one failed, 2 for a mistake on the command line."""
    given = _parse()
    if given.list:
        print("\n".join(f"{name:16}{what}" for name, what in PARTS.items()))
        return 0
    names = given.part or (EMULATED if given.emulate else tuple(PARTS))
    given.output.mkdir(parents=True, exist_ok=True)
    failed = [name for name in names if not _run(name, given.output, given.emulate, given.limit)]
    write_page(given.output, list(PARTS))
    print(
        f"gpu.sh: {len(names) - len(failed)} passed, {len(failed)} "
        f"failed{': ' + ', '.join(failed) if failed else ''}; {given.output / 'gpu.md'}"
    )
    return 1 if failed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/gpu.sh", description=__doc__)
    parser.add_argument(
        "--part", nargs="+", choices=list(PARTS), metavar="NAME", help="only these: " + ", ".join(PARTS)
    )
    parser.add_argument("--emulate", action="store_true", help="on a CPU, what emulation can show")
    parser.add_argument("--list", action="store_true", help="tell what parts there are")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu", help="folder of JSON and page")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_SECONDS, metavar="SECONDS", help=f"of one part (default: {LIMIT_SECONDS})"
    )
    given = parser.parse_args()
    given.output = given.output.resolve()
    if given.emulate and given.part and set(given.part) - set(EMULATED):
        parser.error(
            f"--emulate: {', '.join(sorted(set(given.part) - set(EMULATED)))} need a GPU; emulated are "
            f"{', '.join(EMULATED)}"
        )
    if not given.emulate and not given.list:
        import torch

        if not torch.cuda.is_available():
            parser.error("no CUDA device here; --emulate shows what can be shown without one")
    return given


def _run(name: str, output: Path, emulate: bool, limit: float) -> bool:
    """Whether the part passed. Its words go to NAME.log; one that was cut short keeps what it had found."""
    tell(f"part {name}: {PARTS[name]}")
    result, log = output / f"{name}.json", output / f"{name}.log"
    result.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if emulate:
        environment |= {
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
    command = [sys.executable, "-m", f"tests.gpu.{name}", "--output", str(output), *(["--emulate"] if emulate else [])]
    started = time.perf_counter()
    with log.open("wb") as words:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=words, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(timeout=limit)
        except BaseException as error:
            _end(child.pid)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = None
    seconds = time.perf_counter() - started
    found: dict[str, Any] = {
        "seconds": round(seconds, 1),
        "emulated": emulate,
        "machine": {},
        "tables": {},
        "failures": [],
    }
    if result.exists():
        found = json.loads(result.read_text())
    if code is None:
        found["failures"].append(f"ran past its {limit:.0f} seconds; its words: {log}")
    elif code not in (0, 1) or not result.exists() or (code and not found["failures"]):
        found["failures"].append(f"ended with {code} before its end; its words: {log}")
    result.write_text(json.dumps(found, indent=1) + "\n")
    for failure in found["failures"]:
        tell(f"FAILED {name}: {failure}")
    tell(f"part {name}: {'passed' if not found['failures'] else 'FAILED'} in {seconds:.0f} s")
    return not found["failures"]


def _end(part: int) -> None:
    """Kills a part and all that it started: ranks have sessions of their own, and would go on, on the card that the
    next part measures."""
    try:
        family = [psutil.Process(part), *psutil.Process(part).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=30)


if __name__ == "__main__":
    sys.exit(main())
