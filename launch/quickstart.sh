#!/usr/bin/env bash
# From a fresh clone to a tuned and evaluated vision-language model, on whatever this machine has.
# Makes the environment, prepares and packs easy-VQA, tunes on all local accelerators (without one: two CPU ranks),
# answers all test questions by free generation, and asks the tuned model one of them. Run it again and it goes on where it stopped.
#   bash launch/quickstart.sh [--KEY VALUE ...]     e.g. --model.adapter.dim 8
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=$(date +%s)

bash launch/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"
export TOKENIZERS_PARALLELISM=false

accelerators=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$accelerators" = 0 ]; then
  cores=$(nproc)
  accelerators=$(( cores < 2 ? 1 : 2 ))
  export OMP_NUM_THREADS=$(( cores / accelerators ))
  echo "quickstart: no GPU here: $accelerators CPU ranks with $OMP_NUM_THREADS thread(s) each"
fi
settings=$(python launch/train_mmt.py --print_config "$@")
run=$(sed -n 's/^output: //p' <<< "$settings")
root=$(sed -n 's/^  root: //p' <<< "$settings")

deepspeed --log_level warning --num_accelerators "$accelerators" launch/train_mmt.py --ds ds_configs/zero2.json "$@"
deepspeed --log_level warning --num_accelerators "$accelerators" launch/evaluate.py "$run" --split test

accuracy=$(python -c "import json, sys; m = json.load(open(sys.argv[1])); print('accuracy=%.4f (%d questions)' % (m['accuracy'], m['total']))" "$run/eval/test/metrics.json")
if [ -f "$root/samples/test.jsonl" ]; then
  mapfile -t asked < <(python - "$root/samples" <<'END'
import json, sys
with open(f"{sys.argv[1]}/test.jsonl") as samples:
    for sample in map(json.loads, samples):
        if sample["images"] and "question" in sample["metadata"]:
            print(f"{sys.argv[1]}/{sample['images'][0]}", sample["metadata"]["question"], sep="\n")
            break
END
  )
  if [ "${#asked[@]}" = 2 ]; then
    answer=$(vltrain ask "$run" --image "${asked[0]}" "${asked[1]}")
    echo "quickstart: .venv/bin/vltrain ask $run --image ${asked[0]} \"${asked[1]}\""
    echo "quickstart: $answer"
  fi
fi
echo "quickstart: watch it: .venv/bin/tensorboard --logdir $run/tensorboard"
echo "quickstart: $accuracy seconds=$(( $(date +%s) - started ))"
