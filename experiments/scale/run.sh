#!/bin/sh
# All of the study, on a CPU under Linux: a few minutes.
set -e
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
python experiments/scale/scale.py
python experiments/scale/counted.py
python experiments/report.py scale
