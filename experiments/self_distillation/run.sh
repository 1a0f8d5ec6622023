#!/usr/bin/env bash
# usage: run.sh; SEEDS="0 1 2". Finished runs are skipped; one core.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=outputs/self_distillation
own=(+model.objectives.own._target_=experiments.self_distillation.objective.SelfDistillation +model.objectives.own.momentum=0.97)

train() { # NAME SEED WORDS…
  local name=$1_seed$2 seed=$2
  shift 2
  [ -s "$runs/$name/results.json" ] || python train.py experiment=scenes name="self_distillation/$name" seed="$seed" trainer=cpu threads=1 \
    scoring.every_n_epochs=null data.train_count=8000 trainer.max_epochs=3 'evals=[scenes_probe,scenes_segmentation,scenes_captions,scenes_retrieval]' \
    evals.scenes_probe.pooler=null "$@"
}

for seed in ${SEEDS:-0 1 2}; do
  train plain "$seed"
  train local "$seed" "${own[@]}" +model.objectives.own.masked_weight=0
  train masked "$seed" "${own[@]}" +model.objectives.own.local_weight=0
  train both "$seed" "${own[@]}"
done
python experiments/report.py self_distillation "$runs"/*_seed*
