#!/usr/bin/env bash
# usage: run.sh; SEEDS="0 1 2". Finished runs are skipped; one core.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=outputs/places

train() { # NAME SEED WORDS…
  local name=$1_seed$2 seed=$2
  shift 2
  [ -s "$runs/$name/results.json" ] || python train.py name="places/$name" seed="$seed" experiment=scenes_places trainer=cpu threads=1 \
    scoring.every_n_epochs=null data.train_count=6000 evals=scenes_places "$@"
}

for seed in ${SEEDS:-0 1 2}; do # a scene has one record with captions, and nearly always two questions
  train captions "$seed" data=scenes model.contrastive_weight=1 model.objectives.captions=null trainer.max_epochs=6
  train places_steps "$seed" trainer.max_epochs=2
  train places_captions "$seed" trainer.max_epochs=6
done
python experiments/report.py places "$runs"/*_seed*
