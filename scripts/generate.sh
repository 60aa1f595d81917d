#!/usr/bin/env bash
# Predicts with the adapter that scripts/finetune.sh trained: an answer for each evaluation row,
# written to predictions.jsonl in OUTPUT_DIR.
#
# The original's script of this name generated with the plain base model. Here OUTPUT_DIR is a finished
# run, or one with a checkpoint, and its adapter answers; MODEL and DATASET must be the run's own.
#
# GPU memory: 11.2 GiB = weights 5.4 + embedding and head 1.9 (float32) + adapters 0.7 + keys and values
#   of four rows of 512 + 64 tokens 3.2 (float32). With --bf16, which belongs here if the run was
#   trained with it: 8.7 GiB. The CUDA context and temporary buffers, about 1 GiB, come on top.
# Time: not measured. It grows with the rows: --max_eval_samples 50 for a first look.
#
# To edit: MODEL, DATASET and OUTPUT_DIR by environment, anything else after the name:
#   OUTPUT_DIR=output/mine bash scripts/generate.sh --max_eval_samples 50
# Paths are relative to the root of the repository.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

"${PYTHON:-python}" qlora.py \
    --model_name_or_path "${MODEL:-EleutherAI/pythia-12b}" \
    --output_dir "${OUTPUT_DIR:-./output/pythia-12b-alpaca}" \
    --dataset "${DATASET:-alpaca}" \
    --source_max_len 512 \
    --target_max_len 128 \
    --do_train False \
    --do_eval False \
    --do_predict \
    --predict_with_generate \
    --per_device_eval_batch_size 4 \
    --max_new_tokens 64 \
    --do_sample \
    --top_p 0.9 \
    --num_beams 1 \
    "$@"
