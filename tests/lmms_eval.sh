#!/usr/bin/env bash
# Makes .venv-lmms, an environment of its own for lmms-eval (which pins versions, and wants torchvision and with it torch's CUDA build, 5 GB; no GPU and
# no driver needed), and runs the tests marked lmms_eval in it.
#   bash tests/lmms_eval.sh [pytest's arguments]
# LMMS_VENV names another place for it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
environment=${LMMS_VENV:-.venv-lmms}
if [ ! -x "$environment/bin/lmms-eval" ]; then
    python3 -m venv "$environment"
    # Three signs: the build of exactly that name, not +cpu's. lmms-eval 0.7.3 imports a part of filelock that newer ones do not have.
    "$environment/bin/pip" install "torch===2.13.0" "torchvision==0.28.0" "lmms-eval==0.7.3" "filelock>=3.24.2,<3.25" "pytest>=8" -e .
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
exec "$environment/bin/python" -m pytest -m lmms_eval tests/harness/test_lmms_eval.py "$@"
