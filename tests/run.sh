#!/usr/bin/env bash
# Makes the environment and runs the tests.
#   bash tests/run.sh                  style, lint and types (tests/lint.sh), then all tests but the slow ones
#   bash tests/run.sh -m slow          the slow ones: real runs, some of them long
#   bash tests/run.sh tests/train -k resume
# A process per core works through the files of tests; -n 0: one after the other.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup_env.sh --with test
[ $# -gt 0 ] || bash tests/lint.sh
# Two cores a process group of two: more threads than cores make every rank wait for the other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=false
# Containers like to set it: each of some hundred processes would compile the package anew.
unset PYTHONDONTWRITEBYTECODE
exec .venv/bin/python -m pytest -n "$(getconf _NPROCESSORS_ONLN)" --dist loadfile --no-loadscope-reorder "$@"
