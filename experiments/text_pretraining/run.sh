#!/usr/bin/env bash
# usage: run.sh; SEEDS="0 1 2". Finished runs are skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=outputs/text_pretraining
mkdir -p "$runs"
texts=$runs/captions.txt # 60,000 captions, none of a scene that is scored
[ -s "$texts" ] || python -c "from coca_lit.data.scenes.render import scene_training_captions as all; print('\n'.join(all()))" >"$texts"

train() { # NAME SEED OVERRIDES…
  local name=$1_seed$2 seed=$2
  shift 2
  [ -s "$runs/$name/results.json" ] || python train.py name="text_pretraining/$name" seed="$seed" trainer=cpu threads=1 \
    data.train_count=1000 'evals=[scenes_captions,scenes_retrieval]' "$@"
}

for seed in ${SEEDS:-0 1 2}; do
  pairs=(trainer.max_epochs=16 evals.scenes_captions.every=0 evals.scenes_retrieval.every=0)
  train texts "$seed" data.text="$texts" data.text_every=1 trainer.max_epochs=1 trainer.max_steps=400 model.contrastive_weight=0 \
    'model.freeze=[image_encoder,pooling,decoder.cross_blocks]' 'evals=[]'
  start=init_from=$runs/texts_seed$seed/checkpoints/last.ckpt
  train pairs "$seed" "${pairs[@]}"
  train pretrained "$seed" "${pairs[@]}" "$start"
  train alternating "$seed" "${pairs[@]}" data.text="$texts" data.text_every=2
  train both "$seed" "${pairs[@]}" "$start" data.text="$texts" data.text_every=2
done
python experiments/report.py text_pretraining "$runs"/*_seed*
