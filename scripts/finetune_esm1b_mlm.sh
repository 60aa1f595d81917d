#!/usr/bin/env bash
# ESM-1b on your own proteins: masked language modelling with QLoRA's defaults, as in QLoRA-for-MLM.
#
# GPU memory: at least 2.3 GiB; on a larger GPU it uses more and recomputes less (`--plan`).
# Time: not measured. 10000 steps (or MAX_STEPS) of 16 rows of at most 1024 tokens.
#
# DATASET is a file (.json, .jsonl, .csv, .tsv, .parquet) with a column `input` or `text`, one protein a row;
# proteins longer than the model's 1024 positions are cut. No data was published with the recipe.
# Of the chosen tokens 80 % are masked, 10 % random and 10 % unchanged. For the fork's masking:
#   bash scripts/finetune_esm1b_mlm.sh --mask_replace_prob 1.0 --random_replace_prob 0
# On a GPU that supports bf16 add --bf16. Set MODEL, DATASET, OUTPUT_DIR and MAX_STEPS in the environment; flags after
# the script's name are added. Paths are relative to the root of the repository.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

"${PYTHON:-python}" qlora.py \
    --model_name_or_path "${MODEL:-facebook/esm1b_t33_650M_UR50S}" \
    --output_dir "${OUTPUT_DIR:-./output/esm1b-mlm}" \
    --dataset "${DATASET:-data/proteins.csv}" \
    --objective mlm \
    --mask_prob 0.15 \
    --train_sampling_strategy random \
    --max_steps "${MAX_STEPS:-10000}" \
    --do_eval True \
    "$@"
