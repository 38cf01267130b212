"""A rank's process: `python -m tests.support.rank MODULE ARGUMENT ...` calls MODULE.main(ARGUMENT, ...).

Processes that decode images load the main module of what started them; this one costs them nothing.
"""

import importlib
import sys

from vltrain.cli import leave

if __name__ == "__main__":
    module, *arguments = [
        word for word in sys.argv[1:] if not word.startswith("--local_rank=")
    ]  # which DeepSpeed's launcher puts in
    leave(lambda: importlib.import_module(module).main(*arguments) or 0)
