#!/usr/bin/env bash
# Makes the environment and runs the tests.
#   bash tests/run.sh                  style, lint and types (tests/lint.sh), then all tests but the slow ones
#   bash tests/run.sh -m slow          the slow ones: real runs, some of them long
#   bash tests/run.sh tests/train -k resume
# A process per core, and one for when others wait, work through the files of tests; -n 0: one after the other. Style, lint and types are looked at meanwhile and
# shown at the end; they fail the run as a test does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# What is imported is compiled then, by as many processes as import; pip would compile all packages, one file after the other.
PIP_NO_COMPILE=1 bash launch/setup_env.sh --with test
# Two cores a process group of two: more threads than cores make every rank wait for the other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=false
# Containers like to set it: each of some hundred processes would compile the package anew.
unset PYTHONDONTWRITEBYTECODE
tests() { .venv/bin/python -m pytest -n "$(($(getconf _NPROCESSORS_ONLN) + 1))" --dist loadfile --no-loadscope-reorder "$@"; }

if [ $# -gt 0 ]; then tests "$@"; exit; fi
said=$(mktemp)
bash tests/lint.sh > "$said" 2>&1 & lint=$!
trap 'kill "$lint" 2> /dev/null || true; rm -f "$said"' EXIT
code=0
tests || code=$?
if wait "$lint"; then cat "$said"; else cat "$said"; echo "error: tests/lint.sh failed, see above" >&2; [ "$code" != 0 ] || code=1; fi
exit "$code"
