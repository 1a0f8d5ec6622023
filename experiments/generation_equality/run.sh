#!/usr/bin/env bash
# Ten thousand random cases, seven minutes on one core; a finished run is skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."
run=outputs/generation_equality
[ -s "$run/results.json" ] || python experiments/generation_equality/compare.py "$run" --cases 10000
python experiments/report.py generation_equality "$run"
