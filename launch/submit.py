#!/usr/bin/env python3
"""Checks a recipe and its memory plan, freezes the run and submits it to Slurm:
`python launch/submit.py --recipe FILE --nodes 2 ...`."""

import sys

from vltrain.cli import start

if __name__ == "__main__":
    sys.exit(start("vltrain.programs.submit", sys.argv[1:], program="launch/submit.py"))
