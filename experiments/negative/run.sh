#!/usr/bin/env bash
# usage: run.sh; SEEDS="0 1 2". Finished runs are skipped. The model as it is: the ratio 1 : 2 of experiments/loss_weights.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=outputs/negative
mkdir -p "$runs"
texts=$runs/captions.txt # 60,000 captions, none of a scene that is scored
[ -s "$texts" ] || python -c "from coca_lit.data.scenes.render import scene_training_captions as all; print('\n'.join(all()))" >"$texts"

train() { # NAME SEED WORDS…
  local name=$1_seed$2 seed=$2
  shift 2
  [ -s "$runs/$name/results.json" ] || python train.py "$@" name="negative/$name" seed="$seed" trainer=cpu threads=1
}

for seed in ${SEEDS:-0 1 2}; do
  scenes=(data.train_count=8000 trainer.max_epochs=2 'evals=[scenes_captions,scenes_retrieval]')
  for pooler in parallel cascade; do
    train pooler_$pooler "$seed" experiment=scenes "${scenes[@]}" model.net.pooler=$pooler model.net.pooler_queries=32
  done
  for weight in 1 10; do
    train image_decoder_weight$weight "$seed" --config-dir experiments/image_decoder experiment=image_decoder "${scenes[@]}" \
      model.objectives.image_decoder.weight=$weight
  done

  few=(experiment=scenes data.train_count=1000 'evals=[scenes_captions,scenes_retrieval]')
  pairs=("${few[@]}" trainer.max_epochs=16 evals.scenes_captions.every=0 evals.scenes_retrieval.every=0)
  train text_texts "$seed" experiment=scenes data.train_count=1000 data.text="$texts" data.text_every=1 trainer.max_epochs=1 trainer.max_steps=400 \
    model.contrastive_weight=0 'model.freeze=[image_encoder,pooling,decoder.cross_blocks]' 'evals=[]'
  start=init_from=$runs/text_texts_seed$seed/checkpoints/last.ckpt
  train text_pairs "$seed" "${pairs[@]}"
  train text_pretrained "$seed" "${pairs[@]}" "$start"
  train text_alternating "$seed" "${pairs[@]}" data.text="$texts" data.text_every=2
  train text_both "$seed" "${pairs[@]}" "$start" data.text="$texts" data.text_every=2
done
python experiments/report.py negative "$runs"/*_seed*
