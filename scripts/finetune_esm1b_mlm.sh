#!/usr/bin/env bash
# ESM-1b on proteins of your own: masked language modelling with QLoRA's defaults, as QLoRA-for-MLM has it.
#
# GPU memory: at least 2.3 GiB; on a larger GPU it takes more and recomputes less (`--plan`).
# Time: not measured; 10000 x 16 rows of at most 1024 tokens, or what MAX_STEPS says.
#
# DATASET is a file (.json, .jsonl, .csv, .tsv, .parquet) with a column `input` or `text`, one protein in a row;
# longer ones than the model's 1024 positions are cut. No data was published with the recipe.
# The masks are 80 % mask token, 10 % random, 10 % unchanged; the fork's own are
#   bash scripts/finetune_esm1b_mlm.sh --mask_replace_prob 1.0 --random_replace_prob 0
# On a GPU that can do bf16 add --bf16. To edit: MODEL, DATASET, OUTPUT_DIR and MAX_STEPS by environment, anything
# else after the name. Paths are relative to the root of the repository.
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
