#!/usr/bin/env bash
# usage: run.sh FOLDER [RUN…]: the judgements of Flickr8k with its photos, and models; by default the one in the package, `photos`.
# For three seeds: run.sh FOLDER outputs/flickr8k_two_hours/captions_seed{0,1,2}. COCA_SPICE_JARS names the folder of SPICE's jars.
set -euo pipefail
folder=$(realpath "${1:?usage: run.sh FOLDER [RUN…]}")
shift
cd "$(dirname "$0")/../.."
study=experiments/judged_scores
rows=outputs/judged_scores.csv # tracked files stay as they are until the end, so that rows name a commit
mkdir -p outputs
[ ! -e $study/results.csv ] || cp $study/results.csv $rows
for judges in experts crowd; do
  python -m experiments.judged_scores.judge $judges "$folder" "${@:-photos}" --out $rows --scores outputs/judged_scores
done
cp $rows $study/results.csv
python experiments/report.py judged_scores
