"""The pictures of TensorBoard in the docs: its own page over real runs, by headless Chromium.

    vltrain train --recipe quickstart --ds zero2 --train.eval_every_steps 50
    vltrain train --recipe qformer_shapes --ds zero2 --model.instructblip.qformer.mode adalora ... --output runs/adalora
    vltrain ablate TABLE.yaml --ds zero2 --output runs/table
    vltrain compare runs/quickstart runs/again --tensorboard runs/compared --out .github/compare.png
    python -m tests.screenshots runs/quickstart runs/adalora runs/table runs/compared

writes .github/tensorboard*.png. Needs Chromium (Debian's package) and the extra `test`, whose nicegui brings
websockets. The browser is driven by its DevTools protocol, since TensorBoard's page loads its pictures late.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import websockets
from PIL import Image

from tests.support.browser import browser_words
from tests.support.processes import ROOT

SECONDS = 12.0  # that a page may take to load its curves and pictures
COLOURS = 128
# Of cards with pictures: each as large as it was drawn, nothing cut off, and the pane of settings away.
LARGE = """
(async () => {
  const pause = seconds => new Promise(done => setTimeout(done, 1000 * seconds));
  document.querySelector('button[aria-label="Toggle settings side pane"]').click();
  await pause(1);
  for (const one of document.querySelectorAll('button[aria-label="Toggle actual image size"]')) one.click();
  await pause(1);
  for (let one of document.querySelectorAll('image-card img'))
    for (; !one.matches('.card-grid'); one = one.parentElement)
      Object.assign(one.style, {height: 'auto', maxHeight: 'none', overflow: 'visible'});
})()
"""


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A picture: of which of the folders, what stands behind the address, pixels, what is done on the page first."""

    name: str
    folder: int
    place: str
    size: tuple[int, int]
    script: str = ""


SHOTS = (
    Shot(name="tensorboard_groups", folder=0, place="#custom_scalars", size=(1150, 640)),
    Shot(name="tensorboard", folder=0, place="#images&tagFilter=eval%2Fval", size=(1150, 760)),
    Shot(
        name="tensorboard_norms", folder=0, place="&tagFilter=norm_by_layer#timeseries", size=(1150, 650), script=LARGE
    ),
    Shot(
        name="tensorboard_ranks",
        folder=1,
        place="&tagFilter=adalora%2Franks#timeseries",
        size=(1150, 760),
        script=LARGE,
    ),
    Shot(name="tensorboard_hparams", folder=2, place="#hparams", size=(1150, 420)),
    Shot(name="tensorboard_compared", folder=3, place="&tagFilter=train%2F#timeseries", size=(1150, 640), script=LARGE),
)


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """TensorBoard over a folder, which its page names as seen from above the runs. Gives its address."""
    above = folder.resolve().parents[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        folder.resolve().relative_to(above),
        "--host",
        "127.0.0.1",
        "--port",
        port,
    ]
    server = subprocess.Popen(
        [*map(str, words), "--samples_per_plugin", "images=1000"],
        cwd=above,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs").read()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/?darkMode=false"
    finally:
        server.terminate()
        server.wait()


@contextmanager
def chromium() -> Iterator[str]:
    """A headless browser. Gives the address of its empty page's DevTools."""
    with browser_words() as words:
        browser = subprocess.Popen(
            [*words, "--remote-debugging-port=0", "about:blank"], stderr=subprocess.PIPE, text=True
        )
        try:
            assert browser.stderr is not None
            port = next(found[1] for line in browser.stderr if (found := re.search(r"ws://127\.0\.0\.1:(\d+)/", line)))
            pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
            yield next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        finally:
            browser.terminate()
            browser.wait()


async def photograph(devtools: str, address: str, shot: Shot) -> Image.Image:
    """What the page shows once it is loaded and `shot.script` has run."""
    async with websockets.connect(devtools, max_size=None) as page:
        numbers = itertools.count(1)

        async def call(method: str, **parameters: object) -> dict:
            number = next(numbers)
            await page.send(json.dumps({"id": number, "method": method, "params": parameters}))
            while (answer := json.loads(await page.recv())).get("id") != number:
                pass
            return answer["result"]

        width, height = shot.size
        await call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        await call("Page.navigate", url=address + shot.place)
        await asyncio.sleep(SECONDS)
        if shot.script:
            await call("Runtime.evaluate", expression=shot.script, awaitPromise=True)
            await asyncio.sleep(SECONDS / 4)
        taken = await call("Page.captureScreenshot", format="png")
    return Image.open(io.BytesIO(base64.b64decode(taken["data"])))


def main(folders: list[Path], names: list[str]) -> None:
    """Writes the pictures, or those of `names`."""
    for shot in SHOTS:
        if names and shot.name not in names:
            continue
        folder = folders[shot.folder]
        inner = {0: "tensorboard", 1: "tensorboard", 2: "hparams"}.get(shot.folder, ".")
        with tensorboard(folder / inner) as address, chromium() as devtools:
            picture = asyncio.run(photograph(devtools, address, shot))
        path = ROOT / ".github" / f"{shot.name}.png"
        picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:5]], sys.argv[5:])
