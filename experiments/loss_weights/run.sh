#!/usr/bin/env bash
# usage: run.sh; SEEDS="0 1 2". Finished runs are skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=outputs/loss_weights

for seed in ${SEEDS:-0 1 2}; do
  for ratio in 0:1 1:0 2:1 1:2 1:4; do # contrastive : caption, scaled to a sum of 3
    name=${ratio/:/to}_seed$seed
    weights=$(awk -F: '{printf "model.contrastive_weight=%.4g model.caption_weight=%.4g", 3 * $1 / ($1 + $2), 3 * $2 / ($1 + $2)}' <<<"$ratio")
    # shellcheck disable=SC2086  # two words
    [ -s "$runs/$name/results.json" ] || python train.py experiment=scenes name="loss_weights/$name" seed="$seed" trainer=cpu threads=1 \
      data.train_count=8000 trainer.max_epochs=2 'evals=[scenes_captions,scenes_retrieval]' $weights
  done
done
python experiments/report.py loss_weights "$runs"/*_seed*
