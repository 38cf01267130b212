#!/usr/bin/env bash
# Makes .venv-lowest, with every package of setup.cfg at its lower bound, and runs the tests there.
#   bash tests/lowest.sh                   all but the slow ones
#   bash tests/lowest.sh tests/models -k lora
#   bash tests/lowest.sh --only-install
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
fingerprint=$(cat setup.cfg pyproject.toml | sha256sum | cut -c1-16)
stamp=.venv-lowest/.vltrain-$fingerprint
if [ ! -e "$stamp" ]; then
  echo "lowest: installing the lower bounds of setup.cfg into .venv-lowest (the first time takes some minutes)"
  "$python" -m venv --clear .venv-lowest
  # pip has no way to ask for the lowest versions. Packages that setup.cfg does not name come in their newest.
  # As pip does, uv compiles them: each of the many processes that tests start would compile all it imports where no bytecode may be written.
  .venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5' 2> >(grep -v '^WARNING: Location' >&2)
  .venv-lowest/bin/uv pip install --quiet --native-tls --compile-bytecode --python .venv-lowest/bin/python --resolution lowest-direct -e '.[test]'
  touch "$stamp"
fi
[ "${1:-}" = --only-install ] && exit 0
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=false
# torch 2.8 starts a process to compile in, in each process that imports DeepSpeed; later ones start it when something is compiled.
export TORCH_WARM_POOL=0
exec .venv-lowest/bin/python -m pytest "$@"
