#!/usr/bin/env bash
# usage: [SEEDS="0 1 2"] [PROCESSES=2] run.sh FLICKR8K_FOLDER, which holds dataset_flickr8k.json and images/. SEEDS apply to the long recipe. Each process
# has one thread; any number of processes sees the same batches. Finished runs are skipped.
set -euo pipefail
root=$(realpath "${1:?usage: run.sh FLICKR8K_FOLDER}")
cd "$(dirname "$0")/../.."
runs=outputs/flickr8k_two_hours

train() { # NAME SEED EXPERIMENT OVERRIDES…
  local name=$1_seed$2 seed=$2 experiment=$3
  shift 3
  [ -s "$runs/$name/results.json" ] || torchrun --nproc-per-node="${PROCESSES:-2}" train.py experiment="$experiment" data.root="$root" seed="$seed" \
    name="flickr8k_two_hours/$name" threads=1 evals.flickr8k_captions.every=20 evals.flickr8k_retrieval.every=10 "$@"
}

rerank() { # RUN NAME SEED WEIGHT OVERRIDES…: the best of eight beams, by similarity with this weight and likelihood
  local run=$1_seed$3 name=$2_seed$3 weight=$4
  shift 4
  [ -s "$runs/$name/results.json" ] || coca-evaluate checkpoint="$runs/$run/checkpoints/last.ckpt" scoring.split=val name="flickr8k_two_hours/$name" \
    evals.flickr8k_captions.records.root="$root" "scoring.generate={strategy: beam, num_beams: 8, rerank: contrastive, rerank_weight: $weight}" "$@"
}

neighbours() { # RUN NAME SEED OVERRIDES…: the beam most like the training captions nearest to the photo, and recall normalised by the training photos and captions
  local run=$1_seed$3 name=$2_8beams_neighbours_seed$3 study=experiments.flickr8k_two_hours
  shift 3
  [ -s "$runs/$name/results.json" ] || coca-evaluate checkpoint="$runs/$run/checkpoints/last.ckpt" scoring.split=val name="flickr8k_two_hours/$name" \
    evals=flickr8k evals.flickr8k_captions.records.root="$root" evals.flickr8k_captions._target_=$study.consensus.ConsensusCaptions 'scoring.generate={strategy: beam, num_beams: 8}' \
    evals.flickr8k_retrieval.records.root="$root" evals.flickr8k_retrieval._target_=$study.hubs.BankedRetrieval scoring.rerank=8 evals.flickr8k_retrieval.rerank_weight=0.7 \
    "evals.flickr8k_retrieval.bank={_target_: coca_lit.data.datasets.captions.flickr_records, root: $root, name: flickr8k, split: train}" "$@"
}

mixed='model.objectives.self_critical.reward={_target_: experiments.flickr8k_two_hours.mixed_reward.MixedReward, _partial_: true}'
searches=(evals=flickr8k evals.flickr8k_retrieval.records.root="$root" scoring.rerank=8)

# The whole two hours: twice the steps, each view seen about as often as before, then rewards at a tenth of the learning rate
for seed in ${SEEDS:-0 1 2}; do
  train long "$seed" flickr8k_two_hours trainer.max_epochs=40 data.cached_augmentations=10
  train long_rewards "$seed" scst_flickr8k init_from="$runs/long_seed$seed/checkpoints/last.ckpt"
  rerank long long_8beams_reranked "$seed" 0.2 "${searches[@]}"
  neighbours long long "$seed"
  neighbours long long_288px "$seed" image_size=288 scoring.rerank=16
  rerank long_rewards long_rewards_8beams_reranked "$seed" 0.2 "${searches[@]}"

  # The same with a reward that favours short captions less
  train long_mixed_rewards "$seed" scst_flickr8k init_from="$runs/long_seed$seed/checkpoints/last.ckpt" "$mixed"
  rerank long_mixed_rewards long_mixed_rewards_8beams_weight0.1 "$seed" 0.1 "${searches[@]}"
  neighbours long_mixed_rewards long_mixed_rewards "$seed"
  neighbours long_mixed_rewards long_mixed_rewards_288px "$seed" image_size=288 scoring.rerank=16
  rerank long_mixed_rewards long_mixed_rewards_288px_8beams_weight0.1 "$seed" 0.1 image_size=288 "${searches[@]}" scoring.rerank=16 \
    evals.flickr8k_retrieval.rerank_weight=0.7
done

# Four more epochs of that reward, at 2.5 times the learning rate
train long_mixed_rewards_5e-5 0 scst_flickr8k init_from=$runs/long_mixed_rewards_seed0/checkpoints/last.ckpt "$mixed" model.optimizer.lr=5e-5

# That reward with larger photos than in the training before
train long_mixed_rewards_at_288px 0 scst_flickr8k init_from=$runs/long_seed0/checkpoints/last.ckpt "$mixed" image_size=288
neighbours long_mixed_rewards_at_288px long_mixed_rewards_at_288px 0 scoring.rerank=16

# Half the steps: three seeds, and a model that follows the average of the three; rewards at ten times the learning rate
faster=(model.optimizer.lr=2e-4 trainer.max_epochs=2)
for seed in 0 1 2; do train captions "$seed" flickr8k_two_hours; done
average='{_target_: experiments.flickr8k_two_hours.average_of_teachers.AverageOfTeachers, checkpoints: '
train taught 0 flickr8k_two_hours model.contrastive_weight=0 model.caption_weight=0 \
  model.objectives.teachers="${average}[$runs/captions_seed0, $runs/captions_seed1, $runs/captions_seed2]}"
train rewards 0 scst_flickr8k init_from=$runs/captions_seed0/checkpoints/last.ckpt "${faster[@]}"
rerank captions captions_8beams_reranked 0 0.2 "${searches[@]}"

# Half of these steps with another optimizer, and what the training captions still tell afterwards
for seed in 0 1; do
  train muon "$seed" flickr8k_two_hours trainer.max_epochs=10 'model.optimizer={_target_: coca_lit.training.optim.Timm, name: muon, lr: 2e-3}'
  rerank muon muon_8beams_reranked "$seed" 0.1 "${searches[@]}" evals.flickr8k_retrieval.rerank_weight=0.7
  neighbours muon muon "$seed"
done
train muon_mixed_rewards 0 scst_flickr8k init_from=$runs/muon_seed0/checkpoints/last.ckpt "$mixed"
rerank muon_mixed_rewards muon_mixed_rewards_8beams_reranked 0 0.1 "${searches[@]}" evals.flickr8k_retrieval.rerank_weight=0.7
neighbours muon_mixed_rewards muon_mixed_rewards 0

# A quarter of the steps of the long recipe, for what else might help
short() { # NAME OVERRIDES…
  train "$1" 0 flickr8k_two_hours trainer.max_epochs=10 ema=0.98 "${@:2}"
}
short short
short short_subwords vocabulary=null model.net.context_length=40 "model.net.tokenizer=$(python -m experiments.flickr8k_two_hours.subwords "$root")"
short short_modern model.net.text_tower=modern
short short_paraphrases data.records._target_=experiments.flickr8k_two_hours.paraphrases.paraphrased_records

# The first attempt, with all of a smaller encoder frozen
train frozen_captions 0 flickr8k_frozen
train frozen_rewards 0 scst_flickr8k init_from=$runs/frozen_captions_seed0/checkpoints/last.ckpt "${faster[@]}" data.cached_augmentations=4 \
  init_parts.image_encoder=efficientnet_lite0 model.net.image_encoder=tf_efficientnet_lite0 model.net.pooler=single 'model.freeze=[image_encoder]'
rerank frozen_rewards frozen_rewards_8beams_reranked 0 0.2 evals=flickr8k_captions
python experiments/report.py flickr8k_two_hours $runs/*_seed*
