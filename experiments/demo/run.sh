#!/usr/bin/env bash
# Three seeds of the demo, in batches of 64, and with AdamW; finished runs are skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."
for seed in 0 1 2; do
  for experiment in demo scenes; do
    run=${experiment}_seed$seed
    [ -s "outputs/$run/results.json" ] || python train.py experiment=$experiment seed=$seed name=$run
  done
  run=demo_batches64_seed$seed
  [ -s "outputs/$run/results.json" ] || python train.py seed=$seed name=$run data.batch_size=64 model.optimizer.lr=4e-3
done
python experiments/report.py demo outputs/demo_seed{0,1,2} outputs/demo_batches64_seed{0,1,2} outputs/scenes_seed{0,1,2}
