"""Loads a LLaMA in a process of its own and prints, as JSON, how much memory that took at most. Usage: SOURCE DTYPE
WARM_UP_SOURCE.

`rss_bytes` counts every page in the process's memory, pages of mapped files among them; `anonymous_bytes` those alone
that no file backs, which the kernel cannot simply drop.
"""

import gc
import json
import sys
import threading
from pathlib import Path

import torch

from vltrain.models.pretrained.readers import language_config, load_language


def status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def main(source: str, dtype: str, warm_up: str) -> None:
    load_language(
        "k", warm_up, language_config("k", warm_up, {}), torch.float32, "sdpa"
    )  # modules that are imported at first use
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    rss, anonymous = status("VmRSS"), status("RssAnon")
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    llm = load_language("k", source, language_config("k", source, {}), getattr(torch, dtype), "sdpa")
    done.set()
    watcher.join()
    size = sum(parameter.numel() * parameter.element_size() for parameter in llm.parameters())
    print(json.dumps({"size": size, "rss_bytes": status("VmHWM") - rss, "anonymous_bytes": peak[0] - anonymous}))


if __name__ == "__main__":
    main(*sys.argv[1:])
