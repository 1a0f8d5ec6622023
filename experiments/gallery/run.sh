#!/usr/bin/env bash
# usage: run.sh [FLICKR8K_FOLDER]; SEEDS="0 1 2" METHODS="superclip token_dropping". Finished runs are skipped.
# The set-up is that of experiments/family, with its member coca.
set -euo pipefail
root=${1:+$(realpath "$1")}
cd "$(dirname "$0")/../.."
runs=outputs/gallery
projects=coca_lit.projects
superclip="+model.objectives.superclip._target_=$projects.superclip.objective.CaptionTokens"
dropping="+callbacks.token_dropping._target_=$projects.token_dropping.callback.TokenDropping"

train() { # DATA VARIANT OVERRIDES…
  local data=$1 name=$1_$2_seed$seed
  shift 2
  [ -s "$runs/$name/results.json" ] || python train.py --config-dir experiments/family experiment="family_$data" +member=coca \
    name="gallery/$name" seed="$seed" trainer=cpu threads=1 ${photos:-} "$@"
}

superclip() { # DATA
  local size
  for size in $([ "$1" = scenes ] && echo 16 64 256 || echo 64); do
    train "$1" "coca_$size" data.batch_size="$size"
    train "$1" "superclip_$size" data.batch_size="$size" "$superclip"
  done
}

token_dropping() { # DATA
  local share
  train "$1" captions_64 model.contrastive_weight=0
  train "$1" coca_64
  for share in 0.5 0.35 0.2; do
    train "$1" "dropping_$share" "$dropping" +callbacks.token_dropping.share="$share"
    train "$1" "captions_dropping_$share" model.contrastive_weight=0 "$dropping" +callbacks.token_dropping.share="$share"
  done
}

for seed in ${SEEDS:-0 1 2}; do
  for method in ${METHODS:-superclip token_dropping}; do
    photos=
    "$method" scenes
    [ -z "$root" ] || photos="data.root=$root data.cache_dir=outputs/views" "$method" flickr8k
  done
done
python experiments/report.py gallery "$runs"/*_seed*
