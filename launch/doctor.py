#!/usr/bin/env python3
"""Examines every rank and its machine: `deepspeed launch/doctor.py [FOLDER ...] [--json FILE|-]`, or with srun.
See `vltrain doctor --help`."""

import sys

if __name__ == "__main__":
    from vltrain.cli import start

    sys.exit(start("vltrain.programs.doctor", sys.argv[1:], program="launch/doctor.py"))
