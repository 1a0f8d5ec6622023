#!/usr/bin/env bash
# usage: run.sh; SEEDS="0 1 2". Finished runs are skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=outputs/video

train() { # NAME SEED WORDS…
  local name=$1_seed$2 seed=$2
  shift 2
  [ -s "$runs/$name/results.json" ] ||
    python train.py experiment=scenes_motion name="video/$name" seed="$seed" trainer=cpu threads=1 trainer.max_epochs=3 "$@"
}

for seed in ${SEEDS:-0 1 2}; do
  train middle "$seed" data.frames=1
  train mean "$seed" model.net.frame_pooling=mean
  train tokens "$seed"
  train positions "$seed" model.net.frame_positions=4
done
python experiments/report.py video "$runs"/*_seed*
