#!/usr/bin/env bash
# One run on the folder given as the first argument (dataset_flickr8k.json and images/); a finished run is skipped.
set -euo pipefail
root=$(realpath "${1:?usage: run.sh FLICKR8K_FOLDER}")
cd "$(dirname "$0")/../.."
run=flickr8k_seed0
[ -s "outputs/$run/results.json" ] || python train.py experiment=flickr8k data.root="$root" seed=0 name=$run
python experiments/report.py flickr8k "outputs/$run"
