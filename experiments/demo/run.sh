#!/usr/bin/env bash
# Three seeds of the demo; finished runs are skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."
for seed in 0 1 2; do
  run=demo_seed$seed
  [ -s "outputs/$run/results.json" ] || python train.py seed=$seed name=$run
done
python experiments/report.py demo outputs/demo_seed0 outputs/demo_seed1 outputs/demo_seed2
