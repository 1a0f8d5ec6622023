#!/usr/bin/env bash
# usage: run.sh; SEEDS="0 1 2". Finished runs are skipped. Without image decoder: the single pooler of experiments/poolers.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=outputs/image_decoder

train() { # NAME SEED OVERRIDES…
  local name=$1_seed$2 seed=$2
  shift 2
  [ -s "$runs/$name/results.json" ] || python train.py --config-dir experiments/image_decoder experiment=image_decoder \
    name="image_decoder/$name" seed="$seed" trainer=cpu threads=1 data.train_count=8000 trainer.max_epochs=2 'evals=[scenes_captions,scenes_retrieval]' "$@"
}

for seed in ${SEEDS:-0 1 2}; do
  train weight10 "$seed"
  train weight1 "$seed" model.objectives.image_decoder.weight=1
done
python experiments/report.py image_decoder "$runs"/*_seed*
