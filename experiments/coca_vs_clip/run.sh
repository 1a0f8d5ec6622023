#!/usr/bin/env bash
# usage: run.sh [FLICKR8K_FOLDER]; SEEDS="0 1 2". Finished runs are skipped. With the folder also the CLIP of photos, one seed; its
# CoCa is the frozen run of experiments/flickr8k_two_hours.
set -euo pipefail
root=${1:+$(realpath "$1")}
cd "$(dirname "$0")/../.."
runs=outputs/coca_vs_clip
clip=(++model.net.decoder_layers=0 ++model.net.pooler_queries=1)

train() { # NAME SEED OVERRIDES…
  local name=$1_seed$2 seed=$2
  shift 2
  [ -s "$runs/$name/results.json" ] || python train.py name="coca_vs_clip/$name" seed="$seed" trainer=cpu threads=1 "$@"
}

for seed in ${SEEDS:-0 1 2}; do
  scenes=(experiment=scenes data.train_count=8000 trainer.max_epochs=2 'evals=[scenes_retrieval,scenes_zeroshot,compositional_retrieval]')
  train coca "$seed" "${scenes[@]}"
  train clip "$seed" "${scenes[@]}" "${clip[@]}"
done

if [ -n "$root" ]; then
  train flickr8k_clip 0 experiment=flickr8k_frozen trainer=auto data.root="$root" evals=flickr8k_retrieval "${clip[@]}" \
    evals.flickr8k_retrieval.records.root="$root" evals.flickr8k_retrieval.every=10
fi
python experiments/report.py coca_vs_clip "$runs"/*_seed*
