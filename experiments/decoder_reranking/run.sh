#!/usr/bin/env bash
# usage: run.sh [FLICKR8K_FOLDER]. Needs the run of experiments/demo and, for photos, that of experiments/flickr8k_two_hours.
set -euo pipefail
root=${1:+$(realpath "$1")}
cd "$(dirname "$0")/../.."
for data in scenes compositional; do
  python experiments/decoder_reranking/weights.py $data outputs/demo_seed0/checkpoints/last.ckpt
done
if [ -n "$root" ]; then
  python experiments/decoder_reranking/weights.py flickr8k outputs/flickr8k_two_hours/frozen_captions_seed0/checkpoints/last.ckpt --root "$root" --candidates 8
fi
python experiments/report.py decoder_reranking
