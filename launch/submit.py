#!/usr/bin/env python3
"""Checks a recipe and its memory plan, freezes the run and submits it to Slurm: `python launch/submit.py --recipe FILE --nodes 2 ...`."""

import sys

from vltrain.programs.submit import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], program="launch/submit.py"))
