#!/usr/bin/env python3
"""Q-Former tuning of InstructBLIP:
`deepspeed launch/train_qformer.py --ds ds_configs/zero2.json [--recipe FILE] [--KEY VALUE ...]`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # processes that decode images load this file too, and need none of that
    from vltrain.cli import start

    recipe = Path(__file__).resolve().parent / "recipes" / "qformer_shapes.yaml"
    sys.exit(start("vltrain.programs.train", sys.argv[1:], program="launch/train_qformer.py", default_recipe=recipe))
