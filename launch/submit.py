#!/usr/bin/env python3
"""Checks a recipe and its memory plan, freezes the run and submits it to Slurm:
`python launch/submit.py --recipe FILE --nodes 2 ...`."""

from vltrain.cli import run_script

if __name__ == "__main__":
    run_script("vltrain.programs.submit", program="launch/submit.py")
