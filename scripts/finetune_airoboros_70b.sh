#!/usr/bin/env bash
# airoboros-l2-70b: LLaMA-2-70B on the airoboros instructions in 4 bits, as published with its fork of QLoRA.
#
# GPU memory: at least 54 GiB on each GPU, 48 with the optimizer in CPU memory; on a larger one it uses more and
#   recomputes less (`--plan`). Every GPU holds the whole model.
# Time: about 3 hours on one H200 for every 20 million tokens, by calculation, without evaluation.
#
# Set MODEL, DATASET, OUTPUT_DIR and WORKING_DIR in the environment; flags after the script's name are added:
#   DATASET=instructions.jsonl bash scripts/finetune_airoboros_70b.sh --num_train_epochs 3
# DATASET has rows {instruction, response}, optionally with system, category and skip_prompt_formatting. Since
# airoboros 3.0 the rows are conversations: add --dataset_format airoboros_chat. The adapter goes to
# OUTPUT_DIR, checkpoints and metrics to WORKING_DIR. `constant` ignores the warm-up, as in the original.
# Without flash-attn, sdpa is used. `accelerate launch` uses all GPUs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

"${PYTHON:-python}" -m accelerate.commands.launch qlora.py \
    --model_name_or_path "${MODEL:-meta-llama/Llama-2-70b-hf}" \
    --working_dir "${WORKING_DIR:-./output/airoboros-70b-working}" \
    --output_dir "${OUTPUT_DIR:-./output/airoboros-70b}" \
    --dataset "${DATASET:-instructions.jsonl}" \
    --dataset_format airoboros \
    --model_max_len 4096 \
    --do_train \
    --num_train_epochs 5 \
    --bits 4 \
    --quant_type nf4 \
    --double_quant \
    --bf16 \
    --attn_implementation flash_attention_2 \
    --lora_r 64 \
    --lora_alpha 16 \
    --lora_modules all \
    --lora_dropout 0.0 \
    --per_device_train_batch_size 2 \
    --learning_rate 0.00008 \
    --lr_scheduler_type constant \
    --warmup_steps 0.03 \
    --adam_beta2 0.999 \
    --max_grad_norm 0.3 \
    --weight_decay 0.0 \
    --gradient_checkpointing \
    --remove_unused_columns False \
    --dataloader_num_workers 3 \
    --seed 11422 \
    --data_seed 11422 \
    --logging_strategy steps \
    --logging_steps 1 \
    --save_strategy steps \
    --save_steps 75 \
    --save_total_limit 3 \
    --eval_strategy steps \
    --eval_steps 75 \
    --eval_dataset_size 0.01 \
    "$@"
