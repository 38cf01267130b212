"""How fast this user's devices multiply, as `vltrain doctor` measured it: a file for each device and dtype in
`$XDG_CACHE_HOME/vltrain/rates` (else `~/.cache`), for whoever plans a run. Where the cache can't be read or written
there is none."""

from __future__ import annotations

import datetime
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vltrain.errors import InputError
from vltrain.files.atomic import write_json
from vltrain.files.digest import cache_folder
from vltrain.files.strict_json import read_object

STALE_DAYS = 30
"""After so many, whoever uses a rate says how old it is."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """FLOP/s of a large matrix product. `device`: as it calls itself; `dtype`: fp32 or bf16; `day`: when it was
    measured (ISO 8601)."""

    device: str
    dtype: str
    flops: float
    day: str

    @property
    def days_old(self) -> int:
        """Whole days since it was measured."""
        return (datetime.date.today() - datetime.date.fromisoformat(self.day)).days


def own_device() -> str:
    """What this machine's GPU calls itself, or its CPU where it has none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "CPU")


def keep_rate(device: str, dtype: str, flops: float) -> Rate:
    """Remembers what was measured today."""
    rate = Rate(device=device, dtype=dtype, flops=flops, day=datetime.date.today().isoformat())
    place = _place(device, dtype)
    if place is not None:
        try:
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_json(place, asdict(rate))
        except (OSError, InputError):
            pass
    return rate


def kept_rate(device: str, dtype: str) -> Rate | None:
    """What was measured last, if it was."""
    place = _place(device, dtype)
    if place is None or not place.is_file():
        return None
    try:
        rate = Rate(**read_object(place))
        return rate if rate.flops > 0 and rate.days_old >= 0 else None
    except (InputError, TypeError, ValueError):
        return None


def _place(device: str, dtype: str) -> Path | None:
    folder = cache_folder("rates")
    return None if folder is None else Path(folder, f"{re.sub(r'[^A-Za-z0-9]+', '-', device).strip('-')}-{dtype}.json")
