#!/usr/bin/env bash
# usage: [PROCESSES=2] run.sh FLICKR8K_FOLDER, which holds dataset_flickr8k.json and images/. Trains, quantises into the package, scores what is shipped.
# Each process has one thread. Finished runs are skipped; to ship another training, remove the folders of outputs/photos.
set -euo pipefail
root=$(realpath "${1:?usage: run.sh FLICKR8K_FOLDER}")
cd "$(dirname "$0")/../.."
runs=outputs/photos weights=coca_lit/assets/photos/model.safetensors

train() { # NAME EXPERIMENT OVERRIDES…
  local name=$1 experiment=$2
  shift 2
  [ -s "$runs/$name/results.json" ] || torchrun --nproc-per-node="${PROCESSES:-2}" train.py experiment="$experiment" data.root="$root" name="photos/$name" threads=1 \
    model.net.embed_dim=320 model.net.text_width=320 model.net.text_heads=5 model.net.pooler_heads=5 data.num_workers=0 "$@"
}
train seed0 flickr8k_two_hours seed=0 trainer.max_epochs=16 data.cached_augmentations=5 evals.flickr8k_captions.every=8 evals.flickr8k_retrieval.every=8
if [ ! -s $runs/longer/results.json ]; then # from the quantised weights of the first training
  python experiments/photos/quantise.py $runs/seed0 $weights
  train longer flickr8k_two_hours seed=1 init_from=photos trainer.max_epochs=12 data.cached_augmentations=3 model.optimizer.lr=6e-4 \
    evals.flickr8k_captions.every=6 evals.flickr8k_retrieval.every=6
  python experiments/photos/quantise.py $runs/longer $weights
fi
if [ ! -s $runs/rewards/results.json ]; then # likewise; recorded with PROCESSES=1
  train rewards scst_flickr8k seed=0 init_from=photos evals.flickr8k_captions.every=20 evals.flickr8k_retrieval.every=10 \
    'model.objectives.self_critical.reward={_target_: experiments.flickr8k_two_hours.mixed_reward.MixedReward, _partial_: true}'
  python experiments/photos/quantise.py $runs/rewards $weights
fi

score() { # NAME OVERRIDES…
  local name=$1
  shift
  [ -s "$runs/$name/results.json" ] || torchrun --nproc-per-node="${PROCESSES:-2}" -m coca_lit.cli.evaluate checkpoint=photos name="photos/$name" threads=1 \
    scoring.split=val evals.flickr8k_captions.records.root="$root" evals.flickr8k_retrieval.records.root="$root" evals=flickr8k "$@"
}
score shipped scoring.generate.strategy=beam scoring.rerank=8
score beams4_lp12 evals=flickr8k_captions scoring.generate.strategy=beam scoring.generate.num_beams=4 scoring.generate.length_penalty=1.2
python experiments/photos/speed.py "$root/images"
python experiments/photos/drawn.py "$root"
python experiments/photos/picture.py
python experiments/report.py photos $runs/seed0 $runs/longer $runs/rewards $runs/shipped $runs/beams4_lp12
