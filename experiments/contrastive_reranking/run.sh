#!/usr/bin/env bash
# FLICKR8K: the folder with dataset_flickr8k.json and images/. Needs the runs of experiments/demo and experiments/flickr8k.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -s outputs/demo_short/results.json ] || python train.py name=demo_short trainer.max_epochs=2
for data in scenes compositional; do
  for model in demo_seed0 demo_short; do
    python experiments/contrastive_reranking/weights.py "$data" "outputs/$model/checkpoints/last.ckpt"
  done
done
python experiments/contrastive_reranking/weights.py flickr8k outputs/flickr8k_seed0/checkpoints/last.ckpt --root "$FLICKR8K"
python experiments/report.py contrastive_reranking
