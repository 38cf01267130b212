#!/usr/bin/env python3
"""Multimodal Model Tuning:
`deepspeed launch/train_mmt.py --ds ds_configs/zero2.json [--recipe FILE] [--KEY VALUE ...]`."""

from pathlib import Path

if __name__ == "__main__":  # processes that decode images load this file too, and need none of that
    from vltrain.cli import run_script

    recipe = Path(__file__).resolve().parent / "recipes" / "quickstart.yaml"
    run_script("vltrain.programs.train", program="launch/train_mmt.py", default_recipe=recipe)
