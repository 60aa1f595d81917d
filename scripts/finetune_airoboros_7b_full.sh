#!/usr/bin/env bash
# airoboros 7B, all weights: LLaMA-2-7B on the airoboros instructions in bf16, as published with its fork of
# QLoRA: DeepSpeed ZeRO-2 on 7 GPUs.
#
# GPU memory: about 76 GiB on each of 7 GPUs of 80 GiB, with every layer recomputed; larger ones recompute less.
# Time: about an hour for 5 epochs of 20 million tokens on 7 A100, 18 minutes on 7 H200, by calculation, without
#   evaluation.
#
# Set MODEL, DATASET, OUTPUT_DIR, WORKING_DIR and GPUS in the environment; flags after the script's name are added:
#   GPUS=4 DATASET=instructions.jsonl bash scripts/finetune_airoboros_7b_full.sh --seed 1
# Needs deepspeed (DS_BUILD_OPS=0 pip install deepspeed). DATASET is as in finetune_airoboros_70b.sh. The model goes to
# OUTPUT_DIR, checkpoints and metrics to WORKING_DIR; embeddings are not trained. Unlike the original this saves once
# an epoch: a checkpoint includes the optimizer, about 80 GB. Without flash-attn, sdpa is used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

"${PYTHON:-python}" -m torch.distributed.run --nproc_per_node "${GPUS:-7}" qlora.py \
    --model_name_or_path "${MODEL:-meta-llama/Llama-2-7b-hf}" \
    --working_dir "${WORKING_DIR:-./output/airoboros-7b-full-working}" \
    --output_dir "${OUTPUT_DIR:-./output/airoboros-7b-full}" \
    --dataset "${DATASET:-instructions.jsonl}" \
    --dataset_format airoboros \
    --model_max_len 4096 \
    --do_train \
    --num_train_epochs 5 \
    --full_finetune \
    --bits 16 \
    --bf16 \
    --attn_implementation flash_attention_2 \
    --deepspeed examples/deepspeed_zero2.json \
    --optim adamw_torch \
    --per_device_train_batch_size 12 \
    --learning_rate 0.00002 \
    --lr_scheduler_type cosine \
    --warmup_steps 0.005 \
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
    --save_strategy epoch \
    --save_total_limit 2 \
    --eval_strategy steps \
    --eval_steps 5 \
    --eval_dataset_size 0.02 \
    "$@"
