#!/usr/bin/env bash
# Everything that only a machine with a GPU can show, by one command, in parts of at most ten minutes each; no network once packages are installed.
#   bash tests/gpu.sh                          all parts; the page is runs/gpu/gpu.md, the figures runs/gpu/gpu.json
#   bash tests/gpu.sh --part kernels resume    some of them, again: the page keeps what the others found
#   bash tests/gpu.sh --list                   what there is
#   bash tests/gpu.sh --emulate                on a CPU, what emulation can show (Triton's interpreter, CUDA's rules of autocast): minutes
# Where there is no .venv of launch/setup_env.sh, PYTHON names a Python that has the packages (else python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && python=.venv/bin/python
export TOKENIZERS_PARALLELISM=false
exec "$python" -m tests.gpu "$@"
