#!/usr/bin/env python3
"""Trains and evaluates every row of a table of recipes:
`python launch/ablate.py TABLE.yaml [--ds JSON] [--only ROW ...] [--KEY VALUE ...]`."""

import sys

from vltrain.cli import start

if __name__ == "__main__":
    sys.exit(start("vltrain.programs.studies.ablate", sys.argv[1:], program="launch/ablate.py"))
