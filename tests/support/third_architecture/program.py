"""`program.py PROGRAM WORDS`: a program of vltrain that knows the architecture."""

import importlib
import sys

from tests.support.third_architecture.settings import ProjectorConfig
from vltrain.config.model.architectures import ARCHITECTURES

ARCHITECTURES["projector"] = ProjectorConfig  # the line

if __name__ == "__main__":
    sys.exit(importlib.import_module(f"vltrain.programs.{sys.argv[1]}").main(sys.argv[2:]))
