#!/usr/bin/env bash
# usage: [NOISE="10 30 50"] [SEEDS="0 1 2"] [CHOICES="similarity recaptioned"] run.sh. Finished steps are skipped; one core.
# Tracked files change only at the end, because runs record the commit and whether the tree differs from it.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=outputs/curation choices=$runs/choices.csv
mkdir -p $runs && cp experiments/curation/choices.csv $choices

train() { # NAME SEED OVERRIDES…
  local name=$1_seed$2 seed=$2
  shift 2
  [ -s "$runs/$name/results.json" ] || python train.py experiment=scenes name="curation/$name" seed="$seed" trainer=cpu threads=1 data=laion \
    data.epoch_samples=12800 data.batch_size=64 data.num_workers=0 trainer.max_epochs=1 \
    scoring.every_n_epochs=2 'evals=[scenes_captions,scenes_retrieval]' "$@"
}

for seed in ${SEEDS:-0 1 2}; do
  for noise in ${NOISE:-10 30 50}; do
    data=$runs/data/noise${noise}_seed$seed share=0.$noise kept=$(python -c "print(1 - 0.$noise)")
    [ -s "$data/clean.parquet" ] || python experiments/curation/noise.py make "$data" --share "$share" --seed "$seed"
    train "noise${noise}_all" "$seed" data.shards="$data"
    judge=$runs/noise${noise}_all_seed$seed # the model that the noisy data made
    coca-data score "$data" checkpoint="$judge" precision=fp32 num_workers=0
    coca-data dedup "$data" hash_distance=2 output="$data/distinct.parquet"
    for score in similarity likelihood; do
      coca-data filter "$data" selection="$data/distinct.parquet" top="$kept" by=$score output="$data/$score.parquet"
    done
    for choice in distinct similarity likelihood clean; do
      python experiments/curation/noise.py judge "$data" "$data/$choice.parquet" --share "$share" --seed "$seed" --name $choice \
        --output $choices
    done
    for choice in ${CHOICES:-distinct similarity likelihood recaptioned mixed clean}; do
      if [ "$choice" = recaptioned ] || [ "$choice" = mixed ]; then # the old captions stay in the JSON
        coca-caption "$data/*.tar" checkpoint="$judge" output="$data/recaptioned/" generate.strategy=greedy precision=fp32 threads=1 num_workers=0
      fi
      if [ "$choice" = recaptioned ]; then # the pairs that similarity leaves out come back with captions of the judge
        coca-data filter "$data" selection="$data/distinct.parquet" top="$share" by=-similarity output="$data/rest.parquet"
        train "noise${noise}_recaptioned" "$seed" "data.shards={kept: $data, new: $data/recaptioned}" \
          "data.selection={kept: $data/similarity.parquet, new: $data/rest.parquet}"
      elif [ "$choice" = mixed ]; then # of each picture the old caption or the judge's, drawn in every pass
        train "noise${noise}_mixed" "$seed" data.shards="$data/recaptioned" data.selection="$data/distinct.parquet" \
          'data.caption_keys={original_caption: 0.5, txt: 0.5}'
      else
        train "noise${noise}_$choice" "$seed" data.shards="$data" data.selection="$data/$choice.parquet"
      fi
    done
  done
done
cp $choices experiments/curation
python experiments/report.py curation "$runs"/noise*_seed*
