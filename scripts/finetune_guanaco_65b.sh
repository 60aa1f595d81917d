#!/usr/bin/env bash
# Guanaco 65B: LLaMA-65B on OpenAssistant, as published with QLoRA.
#
# GPU memory: at least 45.9 GiB; on a larger GPU it uses more and recomputes less (`--plan`).
# Time: about 2.3 hours on an H200 for 1875 x 16 rows of 528 tokens, by calculation. Most rows are shorter; evaluation and
#   MMLU are not included.
#
# Set MODEL, DATASET, OUTPUT_DIR and MAX_STEPS in the environment; flags after the script's name are added:
#   MODEL=/path/to/model OUTPUT_DIR=output/mine bash scripts/finetune_guanaco_65b.sh --seed 1
# Paths are relative to the root of the repository. MMLU is read from data/mmlu, otherwise from the hub's cais/mmlu;
# MMLU=False skips it. --eval_dataset_size is not passed: its default is the recipe's 1024, and only the default is
# reduced for a small DATASET. `constant` ignores the warm-up, as in the original.
# For an early conversion with empty special tokens add --tokenizer_patch examples/llama1_tokenizer
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

"${PYTHON:-python}" qlora.py \
    --model_name_or_path "${MODEL:-huggyllama/llama-65b}" \
    --output_dir "${OUTPUT_DIR:-./output/guanaco-65b}" \
    --dataset "${DATASET:-oasst1}" \
    --source_max_len 16 \
    --target_max_len 512 \
    --do_train \
    --do_eval \
    --do_mmlu_eval "${MMLU:-True}" \
    --bits 4 \
    --quant_type nf4 \
    --double_quant \
    --bf16 \
    --lora_r 64 \
    --lora_alpha 16 \
    --lora_modules all \
    --lora_dropout 0.05 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 16 \
    --max_steps "${MAX_STEPS:-1875}" \
    --learning_rate 0.0001 \
    --lr_scheduler_type constant \
    --warmup_steps 0.03 \
    --adam_beta2 0.999 \
    --max_grad_norm 0.3 \
    --weight_decay 0.0 \
    --gradient_checkpointing \
    --train_sampling_strategy group_by_length \
    --remove_unused_columns False \
    --dataloader_num_workers 3 \
    --seed 0 \
    --data_seed 42 \
    --logging_strategy steps \
    --logging_steps 10 \
    --save_strategy steps \
    --save_steps 200 \
    --save_total_limit 40 \
    --eval_strategy steps \
    --eval_steps 187 \
    --max_eval_samples 1000 \
    --per_device_eval_batch_size 1 \
    --max_new_tokens 32 \
    "$@"
