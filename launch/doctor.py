#!/usr/bin/env python3
"""Examines every rank and its machine: `deepspeed launch/doctor.py [FOLDER ...] [--json FILE|-]`, or with srun.
See `vltrain doctor --help`."""

if __name__ == "__main__":
    from vltrain.cli import run_script

    run_script("vltrain.programs.doctor", program="launch/doctor.py")
