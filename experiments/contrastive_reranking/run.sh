#!/usr/bin/env bash
# usage: run.sh [FLICKR8K_FOLDER]; SEEDS="0 1 2". Needs the runs of experiments/demo and, with the folder of photos, the longer ones of
# experiments/flickr8k_two_hours; those of seeds that have no such run are left out.
set -euo pipefail
root=${1:+$(realpath "$1")}
cd "$(dirname "$0")/../.."
for seed in ${SEEDS:-0 1 2}; do
  short=demo_short_seed$seed
  [ -s "outputs/$short/results.json" ] || python train.py name="$short" seed="$seed" trainer.max_epochs=2 threads=1
  for data in scenes compositional; do
    for model in "demo_seed$seed" "$short"; do
      python experiments/contrastive_reranking/weights.py "$data" "outputs/$model/checkpoints/last.ckpt"
    done
  done
  for model in ${root:+long long_rewards}; do
    checkpoint=outputs/flickr8k_two_hours/${model}_seed$seed/checkpoints/last.ckpt
    [ ! -s "$checkpoint" ] || python experiments/contrastive_reranking/weights.py flickr8k "$checkpoint" --root "$root"
  done
done
python experiments/report.py contrastive_reranking
