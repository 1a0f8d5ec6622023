#!/usr/bin/env bash
# usage: run.sh [FLICKR8K_FOLDER]; SEEDS="0 1 2". Finished runs are skipped. The models before finetuning come from experiments/demo, from a CoCa2 with
# the modern text side that is trained alike and, with the folder of photos, the longer ones of experiments/flickr8k_two_hours.
set -euo pipefail
root=${1:+$(realpath "$1")}
cd "$(dirname "$0")/../.."
runs=outputs/forgetting

train() { # NAME SEED OVERRIDES…
  local name=$1_seed$2 seed=$2
  shift 2
  [ -s "$runs/$name/results.json" ] || python train.py "${model[@]}" name="forgetting/$name" seed="$seed" trainer=cpu threads=1 "$@"
}

score() { # NAME SEED CHECKPOINT OVERRIDES…
  local name=$1_seed$2 checkpoint=$3
  shift 3
  [ -s "$runs/$name/results.json" ] || coca-evaluate name="forgetting/$name" checkpoint="$checkpoint" scoring.split=val threads=1 "$@"
}

between() { # NAME SEED BEFORE WEIGHTS OVERRIDES…: points between BEFORE and the run NAME
  local name=$1 seed=$2 before=$3 weights=$4
  shift 4
  [ -s "$runs/${name}_wise${weights##*,}_seed$seed/results.json" ] || coca-evaluate -m \
    checkpoint="$runs/${name}_seed$seed/checkpoints/last.ckpt" interpolate_with="$before" weight="$weights" scoring.split=val threads=1 \
    hydra.sweep.dir="$runs" hydra.sweep.subdir="${name}_wise\${weight}_seed$seed" "$@"
}

tune() { # NAME OVERRIDES…: caption finetuning of scenes in the other style
  local name=$prefix$1
  shift
  train "$name" "$seed" init_from="$before" data.style=narrated data.train_count=2000 trainer.max_epochs=4 model.optimizer.lr=5e-3 \
    model.warmup_steps=10 model.caption_weight=1 "$evals" evals.scenes_retrieval.every=0 "$@"
}

compare() { # MODEL PREFIX OVERRIDES…: the model before, trained unless it is there, and the captions alone with and without protection
  before=outputs/$1_seed$seed/checkpoints/last.ckpt
  prefix=$2
  model=("${@:3}")
  [ -s "outputs/$1_seed$seed/results.json" ] || python train.py "${model[@]}" seed="$seed" name="$1_seed$seed"
  score "${prefix}before" "$seed" "$before" "$evals"
  tune c0 model.contrastive_weight=0
  tune frozen model.contrastive_weight=0 'model.freeze=[image_encoder,pooling,text]'
  tune lora model.contrastive_weight=0 lora.rank=8 "$towers"
}

evals='evals=[narrated_captions,narrated_retrieval,scenes_retrieval]'
towers='lora.parts=[image_encoder,pooling,image_projection,text]'
for seed in ${SEEDS:-0 1 2}; do
  compare scenes '' experiment=scenes
  tune c0.3 model.contrastive_weight=0.3
  tune lora_c0.3 model.contrastive_weight=0.3 lora.rank=8 "$towers"
  between c0 "$seed" "$before" 0.3,0.5,0.7 "$evals"
  compare modern modern_ --config-dir experiments/family experiment=scenes +member=coca2_modern
done
model=()

if [ -n "$root" ]; then
  photos=(evals=flickr8k data_dir="$(dirname "$root")")
  tune() { # NAME OVERRIDES…: two epochs of captions
    local name=flickr8k_$1
    shift
    train "$name" "$seed" experiment=flickr8k_two_hours trainer=auto data.root="$root" data.cached_augmentations=2 init_parts.image_encoder=null init_from="$before" \
      ema=null trainer.max_epochs=2 model.warmup_steps=10 model.caption_weight=1 scoring.generate=null \
      evals.flickr8k_captions.every=0 evals.flickr8k_retrieval.every=0 "$@"
  }
  for seed in ${SEEDS:-0 1 2}; do
    before=outputs/flickr8k_two_hours/long_seed$seed/checkpoints/last.ckpt
    score flickr8k_before "$seed" "$before" "${photos[@]}"
    tune c0 model.contrastive_weight=0
    tune frozen model.contrastive_weight=0 'model.freeze=[image_encoder,pooling,text]'
    tune lora model.contrastive_weight=0 lora.rank=8 "$towers"
    tune c0.3 model.contrastive_weight=0.3
  done
fi
python experiments/report.py forgetting "$runs"/*_seed*
