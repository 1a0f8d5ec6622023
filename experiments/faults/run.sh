#!/usr/bin/env bash
# The soak, and the table of its README; about half an hour on a quiet machine with two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
OMP_NUM_THREADS=1 python experiments/faults/soak.py --kills 110 --seed 0
python experiments/faults/report.py
