#!/usr/bin/env bash
# usage: run.sh; SEEDS="0 1 2". Finished runs are skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=outputs/tasks

train() { # NAME SEED WORDS…
  local name=$1_seed$2 seed=$2
  shift 2
  mkdir -p "$runs/$name"
  [ -s "$runs/$name/results.json" ] || [ -s "$runs/$name/done" ] ||
    { python train.py "$@" name="tasks/$name" seed="$seed" trainer=cpu threads=1 && touch "$runs/$name/done"; }
}

digits=$runs/digits
[ -d "$digits" ] || python experiments/tasks/digits.py "$digits"
for seed in ${SEEDS:-0 1 2}; do
  train entailment "$seed" experiment=scenes_entailment
  train captions "$seed" model.net.tokenizer=scenes_statements 'evals=[scenes_captions,scenes_retrieval]' scoring.every_n_epochs=null
  train captions_of_three "$seed" model.net.tokenizer=scenes_statements data.objects=3 image_size=48 trainer.max_epochs=4 'evals=[]' \
    "init_from=$runs/captions_seed$seed/checkpoints/last.ckpt"
  train entailment_from_captions "$seed" experiment=scenes_entailment image_size=48 'model.freeze=[image_encoder]' \
    "init_from=$runs/captions_of_three_seed$seed/checkpoints/last.ckpt"
  train comparison "$seed" experiment=scenes_comparison "init_from=$runs/entailment_from_captions_seed$seed/checkpoints/last.ckpt"
  train pairs "$seed" data=scenes_and_classes 'evals=[scenes_zeroshot,scenes_retrieval]' 'data.records.weights={pairs: 1, classes: 0.001}' trainer.max_steps=1000
  train classes10 "$seed" data=scenes_and_classes 'evals=[scenes_zeroshot,scenes_retrieval]' 'data.records.weights={pairs: 0.9, classes: 0.1}' trainer.max_steps=1000
  train classes50 "$seed" data=scenes_and_classes 'evals=[scenes_zeroshot,scenes_retrieval]' 'data.records.weights={pairs: 0.5, classes: 0.5}' trainer.max_steps=1000
  [ -s "$runs/probe_scenes_seed$seed/results.json" ] ||
    python -m coca_lit.cli.evaluate "checkpoint=$runs/pairs_seed$seed/checkpoints/last.ckpt" evals=scenes_probe threads=1 name="tasks/probe_scenes_seed$seed"
done
[ -s "$runs/probe_digits_seed0/results.json" ] ||
  python -m coca_lit.cli.evaluate checkpoint=photos image_size=64 evals=folder_probe roots.folder="$digits" evals.folder_probe.pooler.epochs=30 threads=1 name=tasks/probe_digits_seed0
python experiments/report.py tasks "$runs"/*_seed*
