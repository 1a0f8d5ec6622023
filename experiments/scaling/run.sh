#!/usr/bin/env bash
# usage: run.sh [results.parquet of LAION's study]; SEEDS="0 1 2". Finished runs are skipped; one core.
set -euo pipefail
published=${1:+$(realpath "$1")}
cd "$(dirname "$0")/../.."
runs=outputs/scaling seeds=${SEEDS:-0 1 2}
python train.py -m experiment=scenes scaling=small seed="${seeds// /,}" hydra.sweep.dir=$runs trainer=cpu threads=1 'evals=[scenes_captions,scenes_retrieval]' scoring.every_n_epochs=null
coca-report --scaling $runs ${published:+--published "$published"} --output experiments/scaling --objective scenes/t2i_recall@1
python experiments/report.py scaling $runs/*/
