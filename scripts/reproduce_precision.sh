#!/usr/bin/env bash
# What does precision cost? SmolLM2-135M with LoRA on a base in 16 bit, int8, nf4, nf4 with double quantisation and fp4,
# and fully fine-tuned: held-out loss before and after three epochs, with three seeds each.
#
#   bash scripts/reproduce_precision.sh rows.jsonl                   # OpenAssistant or other rows {"text": ...}
#   bash scripts/reproduce_precision.sh rows.jsonl --seeds 0 -- --lora_r 16    # flags of proof.py -- flags of qlora.py
#
# Set MODEL for another model. Table and raw numbers go to scripts/results/precision.{md,json}. The 27 runs
# take minutes on a GPU and hours on a CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
rows=${1:?usage: bash scripts/reproduce_precision.sh ROWS.jsonl}
shift
source scripts/setup_env.sh
source scripts/fetch_smollm2.sh
.venv/bin/python scripts/proof.py precision "${MODEL:-$GGUF}" "$rows" "$@"
