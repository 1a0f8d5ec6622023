#!/usr/bin/env bash
# usage: run.sh; NOISE="10 30 50" SEEDS="0". Finished steps are skipped; one core.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=outputs/curation

train() { # NAME SEED SHARDS OVERRIDES…
  local name=$1_seed$2 seed=$2 shards=$3
  shift 3
  [ -s "$runs/$name/results.json" ] || python train.py name="curation/$name" seed="$seed" trainer=cpu threads=1 data=laion \
    data.shards="$shards" data.epoch_samples=12800 data.batch_size=64 data.num_workers=0 trainer.max_epochs=1 \
    scoring.every_n_epochs=2 'evals=[scenes_captions,scenes_retrieval]' "$@"
}

for seed in ${SEEDS:-0}; do
  for noise in ${NOISE:-10 30 50}; do
    data=$runs/data/noise${noise}_seed$seed share=0.$noise
    [ -s "$data/clean.parquet" ] || python experiments/curation/noise.py make "$data" --share "$share" --seed "$seed"
    train "noise${noise}_all" "$seed" "$data"
    judge=$runs/noise${noise}_all_seed$seed # the model that the noisy data made
    coca-data score "$data" checkpoint="$judge" precision=fp32 num_workers=0
    coca-data dedup "$data" hash_distance=2 output="$data/distinct.parquet"
    for choice in similarity likelihood; do
      coca-data filter "$data" selection="$data/distinct.parquet" top="$(python -c "print(1 - $share)")" by=$choice output="$data/$choice.parquet"
    done
    for choice in distinct similarity likelihood clean; do
      python experiments/curation/noise.py judge "$data" "$data/$choice.parquet" --share "$share" --seed "$seed" --name $choice
      train "noise${noise}_$choice" "$seed" "$data" data.selection="$data/$choice.parquet"
    done
  done
done
python experiments/report.py curation "$runs"/noise*_seed*
