#!/usr/bin/env bash
# Predicts with the adapter that scripts/finetune.sh trained: an answer for each evaluation row,
# written to predictions.jsonl in OUTPUT_DIR.
#
# The original's script of this name generated with the base model alone. Here OUTPUT_DIR is a finished run, or an
# interrupted one with a checkpoint, and its adapter is used; MODEL and DATASET must be those of the run.
#
# GPU memory: 11.2 GiB = weights 5.4 + embedding and head 1.9 (float32) + adapters 0.7 + keys and values
#   of four rows of 512 + 64 tokens 3.2 (float32). With --bf16, to be
#   passed if the run was trained with it: 8.7 GiB. Add about 1 GiB for the CUDA context and temporary buffers.
# Time: not measured; proportional to the number of rows. Start with --max_eval_samples 50.
#
# Set MODEL, DATASET and OUTPUT_DIR in the environment; flags after the script's name are added:
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
