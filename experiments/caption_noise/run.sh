#!/usr/bin/env bash
# usage: run.sh FOLDER, which holds fakecap_refs.json and fakecap_results.json (from tylin/coco-caption) and coco_karpathy_test_generated.json.
# COCA_SPICE_JARS names the folder of SPICE's jars. The three models come from experiments/demo/run.sh: run it first.
set -euo pipefail
captions=$(realpath "${1:?usage: run.sh FOLDER}")
cd "$(dirname "$0")/../.."
rows=outputs/caption_noise.csv # tracked files stay as they are until the end, so that rows name a commit
mkdir -p outputs
cp experiments/caption_noise/results.csv $rows
for what in example test; do
  python -m experiments.caption_noise.noise $what "$captions" --out $rows
done
python -m experiments.caption_noise.noise scenes outputs --out $rows
cp $rows experiments/caption_noise/results.csv
python experiments/report.py caption_noise
