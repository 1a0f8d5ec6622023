#!/usr/bin/env bash
# The table of versions: an environment for each row, in outputs/versions, and what runs there; ten minutes each on two
# idle cores. Needs uv, and Python 3.11 to 3.14, which it finds or fetches. A row that is there is not measured again.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$PWD/outputs/versions
uv build -q --wheel -o "$work/dist" .
wheel=$(echo "$work"/dist/*.whl)

row() { # NAME PYTHON OPTIONS AND REQUIREMENTS…
  grep -q "^$1," experiments/versions/results.csv 2>/dev/null && return
  [ -e "$work/$1" ] || uv venv -q --python "$2" "$work/$1"
  uv pip install -q --python "$work/$1" "${@:3}" "$wheel[test,demo]"
  rm -rf "$work/$1-run"
  PATH=$work/$1/bin:$PATH python -m experiments.versions.steps "$1" "$work/$1-run"
}

uv pip compile -q --python 3.11 --resolution lowest-direct --extra test --extra demo -o "$work/lowest.txt" pyproject.toml
row lowest 3.11 -r "$work/lowest.txt"
row docker 3.12 torch==2.10.0 hydra-core==1.3.8 'omegaconf<2.4'
row hydra14 3.11 --index https://download.pytorch.org/whl/cpu torch==2.13.0 'hydra-core>=1.4.0rc3' 'omegaconf>=2.4.1rc1'
row newest313 3.13 --prerelease allow
row newest314 3.14 --prerelease allow
python experiments/report.py versions
