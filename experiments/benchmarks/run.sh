#!/bin/sh
# All benchmarks, in about 80 minutes on two cores that do nothing else; then the tables and what has moved.
#     experiments/benchmarks/run.sh PHOTOS      # a folder of photos, for the input pipeline and the captions
# Needs open_clip_torch==3.3.0 with transformers==4.56.2, pandas, and clip_benchmark.
cd "$(dirname "$0")/../.."
failed=
run() { python "$@" || failed="$failed $1"; }
export OMP_NUM_THREADS=1
run experiments/benchmarks/train_step.py --repetitions 2
run experiments/benchmarks/convolutional.py --repetitions 2
for name in memory gradient_caching native_aspect gpu_operations limits contrastive; do
    run experiments/benchmarks/$name.py
done
run experiments/benchmarks/generation.py --repetitions 2
run experiments/benchmarks/input_pipeline.py --repetitions 3
run experiments/benchmarks/input_pipeline.py --photos "$1"
export OMP_NUM_THREADS=2
run experiments/benchmarks/scoring.py
run experiments/benchmarks/retrieval.py
unset OMP_NUM_THREADS
run experiments/benchmarks/startup.py
run experiments/benchmarks/from_nothing.py
run experiments/benchmarks/caption_folder.py "$1" --count 200 --workers 2
run experiments/benchmarks/caption_folder.py "$1" --count 32 --workers 2 --model coca_vit_l14
run experiments/benchmarks/caption_folder.py "$1" --count 1000 --workers 2 --model photos
run experiments/benchmarks/busy.py --task "training, demo" --repetitions 1
python experiments/report.py benchmarks
python experiments/benchmarks/moved.py
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
