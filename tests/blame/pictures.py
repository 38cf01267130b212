"""The pictures of `vltrain blame` and `vltrain peek` in the docs: `python -m tests.blame.pictures [FOLDER]`.

Trains the quickstart's model on easy-VQA with a thousandth of the answers wrong (minutes; in FOLDER, where a finished
run stays and is taken the next time), draws the pages and takes pictures of them into .github. Needs a Chromium.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.blame.mislabelled import mislabelled_run
from tests.support.browser import browser_words
from tests.support.processes import ROOT, vltrain

WIDTH = 1080
HEIGHTS = {"blame_worst": 1500, "blame_step": 1240, "peek": 620}
RUN = "runs/quickstart"
MOST_BYTES = 150_000


def pictures(folder: Path) -> None:
    """Draws everything that is there to be drawn. Raises AssertionError where a page or a picture can't be made."""
    if not (folder / RUN / "checkpoints").is_dir():
        mislabelled_run(
            folder, "--train.epochs", "2", "--train.save_every_steps", "100", "--train.keep_checkpoints", "9"
        )
    packs = next((folder / "data" / "packed").iterdir()).relative_to(folder)
    log = [json.loads(line) for line in (folder / RUN / "log.jsonl").read_text().splitlines()]
    # One of the largest losses late in the run, soon after a checkpoint.
    step = max((one for one in log if one["step"] > 600 and one["step"] % 100 < 20), key=lambda one: one["loss"])[
        "step"
    ]
    pages = {
        "blame_worst": ["blame", RUN, "--worst", "6"],
        "blame_step": ["blame", RUN, "--step", str(step)],
        "peek": ["peek", str(packs), "--row", "3"],
    }
    for name, words in pages.items():
        page, picture = folder / f"{name}.html", ROOT / ".github" / f"{name}.png"
        page.unlink(missing_ok=True)
        done = vltrain(*words, "--html" if name == "peek" else "--out", page.name, folder=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        photograph(page, picture, HEIGHTS[name])
        print(f"{picture}: {picture.stat().st_size} bytes")


def photograph(page: Path, picture: Path, height: int) -> None:
    """A picture of the top of a page, in a palette of colours."""
    with browser_words() as words:
        words += [f"--window-size={WIDTH},{height}", f"--screenshot={picture}", page.as_uri()]
        subprocess.run(words, check=True, capture_output=True, timeout=120)
    with Image.open(picture) as taken:
        few = (
            taken.convert("RGB").crop((0, 0, WIDTH, min(height, taken.height))).quantize(160, dither=Image.Dither.NONE)
        )
    few.save(picture, optimize=True)
    assert picture.stat().st_size <= MOST_BYTES, f"{picture} has {picture.stat().st_size} bytes"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        pictures(Path(sys.argv[1] if len(sys.argv) > 1 else place).resolve())
