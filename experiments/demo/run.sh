#!/usr/bin/env bash
# Three seeds of the demo, and with AdamW; finished runs are skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."
for seed in 0 1 2; do
  for experiment in demo scenes; do
    run=${experiment}_seed$seed
    [ -s "outputs/$run/results.json" ] || python train.py experiment=$experiment seed=$seed name=$run
  done
done
python experiments/report.py demo outputs/demo_seed{0,1,2} outputs/scenes_seed{0,1,2}
