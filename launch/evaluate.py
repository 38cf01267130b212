"""Evaluates a trained run, or a file of ScienceQA answers.

    python launch/evaluate.py RUN [--split test]                    in one process
    deepspeed launch/evaluate.py RUN [--split test]                 on all accelerators
    python launch/evaluate.py --predictions FILE --data FOLDER      answers of any model
"""

import sys

from vltrain.programs.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], program="launch/evaluate.py"))
