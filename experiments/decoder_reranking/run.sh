#!/usr/bin/env bash
# usage: run.sh [FLICKR8K_FOLDER]; SEEDS="0 1 2". Needs the runs of experiments/demo and, for photos, that of experiments/flickr8k_two_hours.
set -euo pipefail
root=${1:+$(realpath "$1")}
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
for seed in ${SEEDS:-0 1 2}; do
  for data in scenes compositional; do
    python experiments/decoder_reranking/rows.py $data "outputs/demo_seed$seed/checkpoints/last.ckpt"
  done
done
if [ -n "$root" ]; then
  python experiments/decoder_reranking/rows.py flickr8k outputs/flickr8k_two_hours/frozen_captions_seed0/checkpoints/last.ckpt --root "$root" --counts 8
fi
python experiments/report.py decoder_reranking
