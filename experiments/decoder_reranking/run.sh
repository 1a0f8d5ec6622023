#!/usr/bin/env bash
# usage: run.sh [FLICKR8K_FOLDER]; SEEDS="0 1 2". Needs the runs scenes_seed* of experiments/demo and, with the folder of photos, the longer ones of experiments/flickr8k_two_hours.
set -euo pipefail
root=${1:+$(realpath "$1")}
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
study=experiments/decoder_reranking
rows=outputs/decoder_reranking.csv # tracked files stay as they are until the end, so that rows name a commit
mkdir -p outputs
cp "$study/results.csv" "$rows"
read_pairs() { # DATA RUN_FOLDER OPTIONS…
  python "$study/rows.py" "$1" "$2/checkpoints/last.ckpt" --out "$rows" "${@:3}"
}
for seed in ${SEEDS:-0 1 2}; do
  for data in scenes compositional; do
    read_pairs $data "outputs/scenes_seed$seed"
  done
  [ -z "$root" ] || read_pairs flickr8k "outputs/flickr8k_two_hours/long_seed$seed" --root "$root" --counts 2 4 8 16
done
cp "$rows" "$study/results.csv"
python experiments/report.py decoder_reranking
