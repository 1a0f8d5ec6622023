#!/usr/bin/env bash
# Flickr8k's folder is the first argument (dataset_flickr8k.json and images/). Finished rows are skipped.
set -euo pipefail
root=$(realpath "${1:?usage: run.sh FLICKR8K_FOLDER}")
cd "$(dirname "$0")/../.."
runs=outputs/flickr8k_two_hours
rarely="evals.flickr8k_captions.every=10 evals.flickr8k_retrieval.every=5"
train() { # NAME EXPERIMENT OVERRIDES…
  [ -s "$runs/$1/results.json" ] ||
    python train.py experiment="$2" data.root="$root" seed=0 name="flickr8k_two_hours/$1" $rarely "${@:3}"
}
rerank() { # RUN NAME OVERRIDES…: eight beams, chosen by similarity
  [ -s "$runs/$2/results.json" ] ||
    coca-evaluate checkpoint="$runs/$1/checkpoints/last.ckpt" scoring.split=val name="flickr8k_two_hours/$2" "${@:3}" \
      evals.flickr8k_captions.records.root="$root" 'scoring.generate={strategy: beam, num_beams: 8, rerank: contrastive}'
}
train captions_seed0 flickr8k_two_hours
train rewards_seed0 scst_flickr8k init_from=$runs/captions_seed0/checkpoints/last.ckpt
rerank captions_seed0 captions_8beams_reranked_seed0 evals=flickr8k scoring.rerank=8 evals.flickr8k_retrieval.records.root="$root"

# The first attempt, with all of a smaller encoder frozen
train frozen_captions_seed0 flickr8k_frozen
train frozen_rewards_seed0 scst_flickr8k init_from=$runs/frozen_captions_seed0/checkpoints/last.ckpt data.cache_views=4 \
  init_parts.image_encoder=efficientnet_lite0 model.net.image_encoder=tf_efficientnet_lite0 model.net.pooler=single 'model.freeze=[image_encoder]'
rerank frozen_rewards_seed0 frozen_rewards_8beams_reranked_seed0 evals=flickr8k_captions
python experiments/report.py flickr8k_two_hours $runs/*_seed0
