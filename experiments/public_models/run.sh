#!/usr/bin/env bash
# usage: run.sh [DATA_DIR], with MSCOCO, Flickr30k and ImageNet where `coca-evaluate` looks for them. Without it the cost on this machine is measured instead.
# Finished evaluations are skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ $# -eq 0 ]; then
  OMP_NUM_THREADS=1 python experiments/public_models/cost.py {coca,mammut}_ViT-{S,M,B,L,H}-{32,16,14}
  python experiments/report.py public_models
  exit
fi

apple=coca_ViT-L-14/dfn2b_s13b
study=hf-hub:laion/scaling-laws-for-comparison
settings=s12.8B_dfn_2b_globalbs180224_lr0.0025_b1_0.9_b2_0.95_sched_cosine_warmup6000_gpus512
# Apple's CoCas as captioners
coca-evaluate -m name=public_captions data_dir="$1" 'evals=[mscoco_captions]' scoring.generate.preset=mobileclip2 \
  checkpoint=${apple}_context77,${apple}_docci_s12m_context128,${apple}_gbc10m-long_context256,${apple}_mscoco38k_s12m_context77
# one size after another, and the epochs of one run
coca-evaluate -m name=public_retrieval data_dir="$1" 'evals=[mscoco_retrieval,imagenet_zeroshot]' \
  checkpoint=coca_ViT-B-32/laion2b_s13b_b90k,coca_ViT-L-14/laion2b_s13b_b90k,mammut_ViT-L-14/datacomp_1.4b_s12.8b_b180k,$study/mammut_ViT-B-32_$settings
coca-evaluate -m name=public_epochs data_dir="$1" 'evals=[mscoco_retrieval]' \
  checkpoint=$study/mammut_ViT-B-32_$settings/epoch_1,$study/mammut_ViT-B-32_$settings/epoch_2,$study/mammut_ViT-B-32_$settings/epoch_3
