#!/usr/bin/env bash
# usage: run.sh [FLICKR8K_FOLDER]; SEEDS="0 1 2" METHODS="superclip token_dropping flair …". Finished runs are skipped.
# The set-up is that of experiments/family, with its member coca.
set -euo pipefail
root=${1:+$(realpath "$1")}
cd "$(dirname "$0")/../.."
runs=outputs/gallery
projects=coca_lit.projects
superclip="+model.objectives.superclip._target_=$projects.superclip.objective.CaptionTokens"
dropping="+callbacks.token_dropping._target_=$projects.token_dropping.callback.TokenDropping"
conditioned="+model.objectives.flair._target_=$projects.flair.objective.TextConditioned"
further="+model.objectives.further._target_=$projects.caption_sampling.objective.FurtherCaptions"
merged="data.records._target_=$projects.caption_sampling.records.merged"
flickr="+data.records.records={_target_: coca_lit.data.datasets.captions.flickr_records, _partial_: true}"
self_critical="+model.objectives.self_critical._target_=$projects.rewards.self_critical.SelfCritical"
facts="+model.objectives.self_critical.reward={_target_: $projects.fact_reward.reward.FactReward, _partial_: true}"

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

flair() { # DATA
  local captions decoder
  captions=$([ "$1" = scenes ] && echo 4 || echo 5)
  decoder="evals.$1_retrieval.name=$1_decoder evals.$1_retrieval.every=0 +evals.$1_retrieval.rerank=16"
  train "$1" siglip_64 model.net.contrastive=siglip evals="[$1_retrieval]" $decoder
  train "$1" siglip_all_captions model.net.contrastive=siglip model.contrastive_weight=0 data.captions="$captions" \
    "$conditioned" +model.objectives.flair.pooled_weight=0 +model.objectives.flair.plain_weight=1 \
    evals="[$1_retrieval]" $decoder
  train "$1" flair model.net.contrastive=siglip model.contrastive_weight=0 data.captions="$captions" \
    "$conditioned" evals="[$1_retrieval,$1_flair]" $decoder
}

caption_sampling() { # DATA
  [ "$1" = flickr8k ] || return 0
  train "$1" coca_64
  train "$1" all_captions data.captions=5 "$further"
  train "$1" merged_captions "$merged" "$flickr"
}

middle_layers() { # DATA
  local layer probes
  [ "$1" = flickr8k ] || return 0
  for layer in 4 3 2; do
    probes=$([ "$layer$seed" = 40 ] && echo scenes_layers || true) # of a frozen encoder: the same with every seed
    train "$1" "layer_$layer" init_parts.image_encoder=efficientnet_lite0 model.net.image_encoder=middle_layer \
      "+model.net.image_encoder_args={encoder: tf_efficientnet_lite0, layer: $layer}" evals="[$probes]"
  done
}

fact_reward() { # DATA
  [ "$1" = scenes ] || return 0
  train scenes coca_64
  after captions
  after cider "$self_critical" +model.objectives.self_critical.weight=2
  after facts "$self_critical" +model.objectives.self_critical.weight=2 "$facts"
}

after() { # VARIANT OVERRIDES…: 100 steps after CoCa's
  local variant=$1
  shift
  train scenes "after_$variant" init_from="$runs/scenes_coca_64_seed$seed/checkpoints/last.ckpt" trainer.max_steps=100 \
    model.warmup_steps=20 model.optimizer.lr=1e-4 evals="[scenes_captions]" evals.scenes_captions.name=scenes_facts \
    evals.scenes_captions.every=0 "$@"
}

for seed in ${SEEDS:-0 1 2}; do
  for method in ${METHODS:-superclip token_dropping flair caption_sampling middle_layers fact_reward}; do
    photos=
    "$method" scenes
    [ -z "$root" ] || photos="data.root=$root data.cache_dir=outputs/views" "$method" flickr8k
  done
done
python experiments/report.py gallery "$runs"/*_seed*
