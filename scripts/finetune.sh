#!/usr/bin/env bash
# Pythia-12B on Alpaca: the original's first example.
#
# GPU memory: about 13 GiB at four rows of 512 tokens = weights 5.4 + embedding and head 1.9 (float32)
#   + adapters, gradients and optimizer 2.8 + checkpointed inputs 1.4 + one layer 1.0 + logits 0.4.
#   (nf4 with double quantisation: 4.127 bits a parameter; the optimizer's two states, 1.4 GiB of it,
#   are paged and may move to CPU memory; the CUDA context and temporary buffers, about 1 GiB, come on
#   top.) With --bf16: about 11 GiB.
# Time: about 35 h on an H200, an estimate: 10000 x 16 rows of at most 512 tokens at 657 tokens/s, which
#   is what a 7B LLaMA gave in bf16, one row at a time, (1 150), divided
#   by the ratio of the parameters. Alpaca's rows are mostly far shorter, which makes it much less;
#   float32 was not measured; evaluation and MMLU are not in it.
#
# The original computes in float32 here, and so does this. On a GPU that can do bf16 add it:
#   bash scripts/finetune.sh --bf16
# To edit: MODEL, DATASET, OUTPUT_DIR and MAX_STEPS by environment, anything else after the name.
# Paths are relative to the root of the repository. MMLU reads data/mmlu, else the hub's cais/mmlu;
# MMLU=False leaves it out. --eval_dataset_size is not given: the recipe's 1024 is its default, and
# only the default makes room for a small DATASET. scripts/generate.sh predicts with the result.
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
