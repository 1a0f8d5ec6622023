#!/usr/bin/env bash
# The soak, and the table of its README; about a quarter of an hour on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
OMP_NUM_THREADS=1 python experiments/faults/soak.py --kills 110 --seed 0
python experiments/report.py faults
