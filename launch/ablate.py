#!/usr/bin/env python3
"""Trains and evaluates every row of a table of recipes:
`python launch/ablate.py TABLE.yaml [--ds JSON] [--only ROW ...] [--KEY VALUE ...]`."""

from vltrain.cli import run_script

if __name__ == "__main__":
    run_script("vltrain.programs.studies.ablate", program="launch/ablate.py")
