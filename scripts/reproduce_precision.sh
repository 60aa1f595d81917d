#!/usr/bin/env bash
# Does precision cost anything? SmolLM2-135M with LoRA on a base in 16 bit, int8, nf4, nf4 with double quantisation and
# fp4, and fully fine-tuned: held-out loss before and after three epochs, three seeds each.
#
#   bash scripts/reproduce_precision.sh rows.jsonl                   # OpenAssistant rows {"text": ...}, or others
#   bash scripts/reproduce_precision.sh rows.jsonl --seeds 0 -- --lora_r 16    # its own flags -- flags of qlora.py
#
# MODEL names another model. Table, chart and raw numbers: scripts/results/precision.{md,png,json}. 21 runs, which take
# a GPU minutes and a CPU hours.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
rows=${1:?a file of rows, for example oasst1.jsonl}
shift
source scripts/setup_env.sh
source scripts/fetch_smollm2.sh
.venv/bin/python scripts/proof.py bits "${MODEL:-$GGUF}"
.venv/bin/python scripts/proof.py precision "${MODEL:-$GGUF}" "$rows" "$@"
