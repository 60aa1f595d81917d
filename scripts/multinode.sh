#!/usr/bin/env bash
# One run on several machines: start the same command on each of them, with HEAD set to the address of the first.
#
#   HEAD=10.0.0.1 NODES=2 bash scripts/multinode.sh \
#       --model_name_or_path M --dataset my.jsonl --bf16 --output_dir /shared/out
#
# torchrun's processes meet at HEAD:PORT and get their ranks. --output_dir must be on a disk that all machines share.
#   GPUS   processes on this machine; default: one for each GPU
#   PORT   default: 29500
#   NODES  number of machines, or a range such as 1:2, with which the run starts when no more machines join within 30 s
# If a machine or process fails, the run ends on all others: at once if its connections break, after --ddp_timeout if it
# falls silent. The same command resumes from the last checkpoint, on any number of machines: the effective batch stays
# the same.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
here=" $(hostname -I 2>/dev/null || true) " # torchrun recognises HEAD only if the host name resolves to it

# If HEAD falls silent, torchrun ($$, below) keeps waiting for it and does not notice that its own processes have ended.
ended() { [ "$(ps -o stat= --ppid $$ | cut -c1 | sort -u)" = Z ]; }
(while sleep 10 && kill -0 $$; do
    ended && sleep 10 && ended && kill -KILL $$
done &> /dev/null &)

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NODES:-2}" \
    --nproc_per_node "${GPUS:-gpu}" \
    --rdzv_backend c10d \
    --rdzv_endpoint "${HEAD:?the address of the first machine}:${PORT:-29500}" \
    --rdzv_id "${RUN_ID:-qlora}" \
    $([[ $here == *" $HEAD "* ]] && echo --rdzv_conf is_host=1) \
    ${LOCAL_ADDR:+--local_addr "$LOCAL_ADDR"} \
    qlora.py "$@"
