#!/usr/bin/env bash
# usage: run.sh [FLICKR8K_FOLDER]; SEEDS="0 1 2". Finished runs are skipped. With the folder also the runs on photos, one seed.
set -euo pipefail
root=${1:+$(realpath "$1")}
cd "$(dirname "$0")/../.."
runs=outputs/coca_vs_clip
clip=(+model.net.decoder_layers=0 +model.net.pooler_queries=1)

train() { # NAME SEED OVERRIDES…
  local name=$1_seed$2 seed=$2
  shift 2
  [ -s "$runs/$name/results.json" ] || python train.py name="coca_vs_clip/$name" seed="$seed" trainer=cpu threads=1 "$@"
}

for seed in ${SEEDS:-0 1 2}; do
  scenes=(data.train_count=8000 trainer.max_epochs=2 'evals=[scenes_retrieval,scenes_zeroshot,compositional_retrieval]')
  train coca "$seed" "${scenes[@]}"
  train clip "$seed" "${scenes[@]}" "${clip[@]}"
done

if [ -n "$root" ]; then
  photos=(experiment=flickr8k data.root="$root" evals=flickr8k_retrieval evals.flickr8k_retrieval.records.root="$root")
  train flickr8k_coca 0 "${photos[@]}"
  train flickr8k_clip 0 "${photos[@]}" "${clip[@]}"
fi
python experiments/coca_vs_clip/report.py "$runs"/*_seed*
