#!/usr/bin/env bash
# usage: run.sh FOLDER, which holds fakecap_refs.json and fakecap_results.json (from tylin/coco-caption) and coco_karpathy_test_generated.json.
# COCA_SPICE_JARS names the folder of SPICE's jars. The three models come from experiments/demo/run.sh: run it first.
set -euo pipefail
captions=$(realpath "${1:?usage: run.sh FOLDER}")
cd "$(dirname "$0")/../.."
for what in example test; do
  python -m experiments.caption_noise.noise $what "$captions"
done
python -m experiments.caption_noise.noise scenes outputs
python experiments/report.py caption_noise
