"""See `tests.golden`."""

import argparse
import json
import tempfile
from pathlib import Path

from tests.golden.runs import KEPT, difference, kept, losses_now

parser = argparse.ArgumentParser(prog="python -m tests.golden", description="Compares losses with the kept ones.")
parser.add_argument("--write", action="store_true", help="keep what comes out now")
given = parser.parse_args()
with tempfile.TemporaryDirectory() as folder:
    now = losses_now(Path(folder))
before = kept() if KEPT.exists() else {}
for name, values in now.items():
    print(f"{difference(values, before[name]):9.1e}  {name}" if name in before else f"      new  {name}")
for name in before.keys() - now.keys():
    print(f"     gone  {name}")
if given.write:
    lines = (f"{json.dumps(name)}: {json.dumps(values)}" for name, values in now.items())
    KEPT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
