#!/usr/bin/env bash
# usage: run.sh; SEEDS="0 1 2". Finished runs are skipped; one core.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=outputs/places

train() { # NAME SEED WORDS…
  local name=$1_seed$2 seed=$2
  shift 2
  [ -s "$runs/$name/results.json" ] || python train.py name="places/$name" seed="$seed" experiment=scenes_places trainer=cpu threads=1 \
    data.train_count=6000 scoring.every_n_epochs=null evals=scenes_places "$@"
}

alone=(data=scenes data.batch_size=64 model.contrastive_weight=1 model.objectives.captions=null)
for seed in ${SEEDS:-0 1 2}; do # a scene has one record with captions, and nearly always two questions
  train captions "$seed" "${alone[@]}" trainer.max_epochs=6
  train captions12 "$seed" "${alone[@]}" trainer.max_epochs=12
  train places_captions "$seed" data.batch_size=64 trainer.max_epochs=6
  train places_wide6 "$seed" trainer.max_epochs=6
  train places_wide12 "$seed"
done
python experiments/report.py places "$runs"/*_seed*
