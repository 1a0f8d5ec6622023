#!/usr/bin/env bash
# usage: run.sh [FLICKR8K_FOLDER], which holds dataset_flickr8k.json and images/; SEEDS="0 1 2", SAMPLES="3840 7680 15360", of photos
# PHOTOS="6000 30000", and TEACHERS="photos" or runs of flickr8k_two_hours. Finished steps are skipped; one core.
set -euo pipefail
root=${1:+$(realpath "$1")}
cd "$(dirname "$0")/../.."
runs=outputs/distillation data=outputs/distillation/data new=outputs/distillation/recaptioned
export OMP_NUM_THREADS=1

train() { # NAME SEED WORDS…
  local name=$1_seed$2 seed=$2
  shift 2
  [ -s "$runs/$name/results.json" ] || python train.py name="distillation/$name" seed="$seed" trainer=cpu threads=1 "$@"
}

[ -d $data ] || python -m coca_lit.tools.prepare.scenes shards $data --count 12000 --size 32
for teacher in 10 11; do # each sees five times the samples of the longest training of a student
  train teacher $teacher experiment=scenes data.train_count=12000 trainer.max_epochs=6 'evals=[scenes_captions,scenes_retrieval]'
done
teachers=("$runs/teacher_seed10" "$runs/teacher_seed11")
# Three captions an image by the first teacher, beside the old one; then what both teachers say of all of them.
coca-caption "$data/*.tar" checkpoint="${teachers[0]}" output=$new/ generate.strategy=sample generate.num_captions=3 precision=fp32 threads=1 num_workers=0
coca-data teach $new --teachers "${teachers[@]}" --caption-keys original_caption generated_captions --views 4 --precision fp32 --num-workers 0

distilled=(model.contrastive_weight=0.3
  +model.objectives.teachers._target_=coca_lit.projects.distillation.objective.Distillation +model.objectives.teachers.weight=0.7)
old='data.caption_keys={original_caption: 1}' both='data.caption_keys={original_caption: 0.5, generated_captions: 0.5}'
for seed in ${SEEDS:-0 1 2}; do
  for samples in ${SAMPLES:-3840 7680 15360}; do
    words=(experiment=scenes data=laion data.shards=$new data.epoch_samples="$samples" data.batch_size=64 data.num_workers=0 trainer.max_epochs=1 model.warmup_steps=30
      'evals=[scenes_captions,scenes_retrieval]')
    train "plain_$samples" "$seed" "${words[@]}" "$old"
    train "captions_$samples" "$seed" "${words[@]}" "$both"
    train "distilled_$samples" "$seed" "${words[@]}" "$old" "${distilled[@]}" data.teachers=$new
    train "reinforced_$samples" "$seed" "${words[@]}" "$both" "${distilled[@]}" data.teachers=$new
  done
done

if [ -n "$root" ]; then # Flickr8k's training split alone; a vocabulary of its words, as flickr8k_two_hours has
  shards=$runs/photos/shards conf=$runs/photos/conf
  coca-data prepare "$root" $shards
  coca-data teach $shards --teachers ${TEACHERS:-photos} --caption-keys captions --views 2 --precision fp32 --num-workers 0
  mkdir -p "$conf/experiment"
  printf '# @package _global_\ndefaults: [flickr8k]\n' > "$conf/experiment/flickr8k_words.yaml"
  python experiments/distillation/words.py "$root" >> "$conf/experiment/flickr8k_words.yaml"
  for seed in ${SEEDS:-0 1 2}; do
    for samples in ${PHOTOS:-6000 30000}; do
      words=(--config-dir "$conf" experiment=flickr8k_words image_size=128 data=laion data.shards=$shards data.caption_keys=captions
        data.epoch_samples="$samples" data.batch_size=64 data.num_workers=0 trainer.max_epochs=1 model.warmup_steps=30 evals=flickr8k roots.flickr8k="$root")
      train "photos_plain_$samples" "$seed" "${words[@]}"
      train "photos_distilled_$samples" "$seed" "${words[@]}" "${distilled[@]}" data.teachers=$shards
    done
  done
fi
python experiments/report.py distillation "$runs"/*_seed*
