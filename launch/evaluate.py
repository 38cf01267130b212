"""Evaluates a trained run, or a file of ScienceQA answers.

python launch/evaluate.py RUN [--split test]                    in one process
deepspeed launch/evaluate.py RUN [--split test]                 on all accelerators
python launch/evaluate.py --predictions FILE --data FOLDER      answers of any model
"""

if __name__ == "__main__":  # processes that decode images load this file too, and need none of that
    from vltrain.cli import run_script

    run_script("vltrain.programs.evaluate", program="launch/evaluate.py")
