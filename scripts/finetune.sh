#!/usr/bin/env bash
# Pythia-12B on Alpaca: the original's first example.
#
# GPU memory: at least 11.9 GiB, with --bf16 10.5; on a larger GPU it uses more and recomputes less (`--plan`).
# Time: about 2 hours on an H200 with --bf16 for 10000 x 16 rows of 512 tokens, by calculation. Most of Alpaca's rows
#   are far shorter; float32 was not measured; evaluation and MMLU are not included.
#
# Computes in float32, like the original. On a GPU that supports bf16 add it:
#   bash scripts/finetune.sh --bf16
# Set MODEL, DATASET, OUTPUT_DIR and MAX_STEPS in the environment; flags after the script's name are added.
# Paths are relative to the root of the repository. MMLU is read from data/mmlu, otherwise from the hub's cais/mmlu;
# MMLU=False skips it. --eval_dataset_size is not passed: its default is the recipe's 1024, and only the default is
# reduced for a small DATASET. scripts/generate.sh predicts with the result.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

"${PYTHON:-python}" qlora.py \
    --model_name_or_path "${MODEL:-EleutherAI/pythia-12b}" \
    --output_dir "${OUTPUT_DIR:-./output/pythia-12b-alpaca}" \
    --dataset "${DATASET:-alpaca}" \
    --source_max_len 384 \
    --target_max_len 128 \
    --do_train True \
    --do_eval True \
    --do_mmlu_eval "${MMLU:-True}" \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --max_steps "${MAX_STEPS:-10000}" \
    --optim paged_adamw_32bit \
    --data_seed 42 \
    --logging_steps 10 \
    --save_strategy steps \
    --save_steps 1000 \
    --save_total_limit 40 \
    --eval_strategy steps \
    --eval_steps 1000 \
    --max_eval_samples 1000 \
    --per_device_eval_batch_size 4 \
    "$@"
