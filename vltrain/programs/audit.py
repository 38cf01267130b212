"""`vltrain audit MODEL|RECIPE`: does packed training of this model compute what transformers computes for each sample
alone? Shown on a small random copy of its own config, in seconds, on a CPU, without weights or data.

    vltrain audit MODEL|RECIPE [--json FILE|-]
        MODEL: a folder with config.json, or a hub name, of a language model or a vision-language model;
        RECIPE: a file or a name of launch/recipes; of a table its rows, of one in stages its stages, each model once

examples:
    vltrain audit Qwen/Qwen3-VL-4B-Instruct
    vltrain audit quickstart
    vltrain audit folder-with-config.json --json audit.json

A line a check, with the size of the largest relative difference, at most 1e-5 in fp32: packed = alone, for positions,
embeddings (visual tokens included), states, loss and gradient; a gradient over ranks and micro-steps = the whole;
generation in a padded batch = alone; frozen weights stay, trained ones are reached; merged and exported = trained. Of a
model without a recipe the last line but one tells what transformers' own Trainer would make of the gradient. --json
writes the same as data to a file, or with - prints it in place of the lines. Exit code 0; 1 where a check fails; 2 for
a mistake on the command line and for a model that is refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vltrain.audit.recipe import audits_of
from vltrain.config.command_line import COMMAND_LINE, split_arguments
from vltrain.console import start_logging
from vltrain.errors import InputError, exits_cleanly


@exits_cleanly
def main(argv: list[str], *, program: str = "vltrain audit") -> int:
    """Audits what the command line names. Returns the exit code, see the module."""
    arguments = split_arguments(argv)
    if ("help", None) in arguments.options:
        print((__doc__ or "").strip())
        return 0
    arguments.require_known(("json",))
    if len(arguments.positionals) != 1:
        raise InputError(f"{COMMAND_LINE}: found {list(arguments.positionals)}, expected one model or recipe")
    report = arguments.last("json")
    if report not in (None, "-") and not Path(report).absolute().parent.is_dir():
        raise InputError(f"{COMMAND_LINE}: --json: found '{report}', expected a file in a folder that exists, or -")
    start_logging()
    reports = audits_of(arguments.positionals[0])
    data = [one.to_json() for one in reports]
    if report == "-":
        print(json.dumps(data, indent=1), flush=True)
    else:
        print("\n\n".join(one.to_text() for one in reports), flush=True)
    if report not in (None, "-"):
        Path(report).write_text(json.dumps(data, indent=1) + "\n")
    failed = [one for one in reports if not one.passed]
    for one in failed:
        print(f"audit: {one.refusal()}", file=sys.stderr, flush=True)
    return int(bool(failed))
