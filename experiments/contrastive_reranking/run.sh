#!/usr/bin/env bash
# usage: run.sh [FLICKR8K_FOLDER]; SEEDS="0 1 2". Needs the runs scenes_seed* of experiments/demo and, with the folder of photos, the longer ones of
# experiments/flickr8k_two_hours; seeds without such a run are left out.
set -euo pipefail
root=${1:+$(realpath "$1")}
cd "$(dirname "$0")/../.."
study=experiments/contrastive_reranking
rows=outputs/contrastive_reranking.csv # tracked files stay as they are until the end, so that rows name a commit
mkdir -p outputs
cp "$study/results.csv" "$rows"
weights() { # DATA RUN_FOLDER OPTIONS…
  python "$study/weights.py" "$1" "$2/checkpoints/last.ckpt" --out "$rows" "${@:3}"
}
for seed in ${SEEDS:-0 1 2}; do
  short=demo_short_seed$seed
  [ -s "outputs/$short/results.json" ] || python train.py experiment=scenes name="$short" seed="$seed" trainer.max_epochs=2 threads=1
  for data in scenes compositional; do
    for model in "scenes_seed$seed" "$short"; do
      weights "$data" "outputs/$model"
    done
  done
  for model in ${root:+long long_rewards}; do
    run=outputs/flickr8k_two_hours/${model}_seed$seed
    [ ! -s "$run/results.json" ] || weights flickr8k "$run" --root "$root"
  done
done
cp "$rows" "$study/results.csv"
python experiments/report.py contrastive_reranking
