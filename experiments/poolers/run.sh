#!/usr/bin/env bash
# usage: run.sh; SEEDS="0 1 2". Finished runs are skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=outputs/poolers

for seed in ${SEEDS:-0 1 2}; do
  for pooler in single parallel cascade; do
    # The single pooler gives one of its queries to the contrastive vector: all decoders see 32 image tokens.
    queries=$([ $pooler = single ] && echo 33 || echo 32)
    name=${pooler}_seed$seed
    [ -s "$runs/$name/results.json" ] || python train.py name="poolers/$name" seed="$seed" trainer=cpu threads=1 data.train_count=8000 \
      trainer.max_epochs=2 'evals=[scenes_captions,scenes_retrieval]' +model.net.pooler=$pooler +model.net.pooler_queries="$queries"
  done
done
python experiments/report.py poolers "$runs"/*_seed*
