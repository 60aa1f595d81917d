#!/usr/bin/env bash
# From a fresh clone to a fine-tuned model on this machine: bash scripts/quickstart.sh
#
# Fine-tunes SmolLM2-135M-Instruct with 4-bit QLoRA on the answers of a fictional product's support desk
# (examples/data/support_desk), then prints its answers to held-out questions before and after. Runs on a CPU or GPU
# without an account or a model hub: the base model comes in a Python package. A second run reuses the environment, the
# model and the finished training.
#
#   QUICKSTART_STEPS=20 bash scripts/quickstart.sh    fewer steps
#   QUICKSTART_OUTPUT=dir                             another folder for the results
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
source scripts/fetch_smollm2.sh  # sets GGUF

STEPS=${QUICKSTART_STEPS:-144}  # 2 epochs of 288 rows in batches of 4
OUTPUT=${QUICKSTART_OUTPUT:-output/quickstart}

common=(
  --model_name_or_path "$GGUF" --cache_dir .cache
  --dataset examples/data/support_desk --source_max_len 64 --target_max_len 64
  --bits 4 --lora_r 16 --lora_alpha 32
  --do_predict --predict_with_generate --max_new_tokens 48 --per_device_eval_batch_size 8 --max_eval_samples 16
)

echo "== Training (4-bit QLoRA, $STEPS steps), then answering held-out questions"
.venv/bin/python qlora.py "${common[@]}" \
  --output_dir "$OUTPUT" --do_eval --max_steps "$STEPS" \
  --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --gradient_checkpointing False \
  --learning_rate 1e-3 --lr_scheduler_type linear --save_steps 1000 --logging_steps 24 "$@"

if [[ ! -f $OUTPUT/before/predictions.jsonl ]]; then
  echo "== The base model's answers to the same questions"
  .venv/bin/python qlora.py "${common[@]}" --output_dir "$OUTPUT/before" --do_train False
fi

.venv/bin/python scripts/compare_predictions.py "$OUTPUT/before/predictions.jsonl" "$OUTPUT/predictions.jsonl" --show 3
echo
echo "adapter:      $OUTPUT/adapter_model.safetensors"
echo "loss curve:   $OUTPUT/loss.png"
echo "predictions:  $OUTPUT/predictions.jsonl"
