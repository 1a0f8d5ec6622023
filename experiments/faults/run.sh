#!/usr/bin/env bash
# The soak, and the table of its page; about half an hour on a core. Then object stores: a quarter of an hour, mostly of waiting.
set -euo pipefail
cd "$(dirname "$0")/../.."
python experiments/faults/soak.py --faults 100 --seed 2
python experiments/report.py faults
OMP_NUM_THREADS=1 python experiments/faults/stores.py --faults 30 --seed 1
OMP_NUM_THREADS=1 python experiments/faults/sweeps.py --faults 20
