#!/usr/bin/env bash
# usage: run.sh [FLICKR8K_FOLDER]; SEEDS="0 1 2". Finished runs are skipped.
set -euo pipefail
root=${1:+$(realpath "$1")}
cd "$(dirname "$0")/../.."
runs=outputs/family
members="coca coca2 coca2_modern mammut captioner cappa"

train() { # DATA MEMBER SEED OVERRIDES…
  local data=$1 member=$2 seed=$3 name=$1_$2_seed$3
  shift 3
  [ -s "$runs/$name/results.json" ] || python train.py --config-dir experiments/family experiment="family_$data" +member="$member" \
    name="family/$name" seed="$seed" trainer=cpu threads=1 "$@"
}

for seed in ${SEEDS:-0 1 2}; do
  for member in $members; do
    train scenes "$member" "$seed"
  done
  for member in ${root:+$members}; do
    train flickr8k "$member" "$seed" data.root="$root" data.cache_dir=outputs/views
  done
done
python -m experiments.family.cost ${root:+"$root"} # last: it writes a tracked file, and runs record whether such files differ from their commit
python experiments/report.py family "$runs"/*_seed*
