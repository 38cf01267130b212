#!/usr/bin/env bash
# Makes .venv-cuda, torch's CUDA build (4.7 GB; no GPU and no driver needed) in front of what .venv has, and runs the tests marked fake_cuda in it.
#   bash tests/fake_cuda.sh [pytest's arguments]
# FAKE_CUDA_VENV names another place for it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
environment=${FAKE_CUDA_VENV:-.venv-cuda}
version=$(.venv/bin/python -c 'import torch; print(torch.__version__.split("+")[0])')
if [ ! -x "$environment/bin/python" ]; then
    .venv/bin/python -m venv "$environment"
fi
if ! ls -d "$environment"/lib/python3*/site-packages/torch > /dev/null 2>&1; then
    "$environment/bin/pip" install "torch===$version"  # three signs: the build of exactly that name, not +cpu's
fi
own=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
others=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false PYTHONPATH=".:$own:$others"
exec "$environment/bin/python" -m pytest -m fake_cuda tests/models/test_fake_cuda.py "$@"
