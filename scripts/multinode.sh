#!/usr/bin/env bash
# One run over several machines: start the same line on each of them, HEAD being the first one's address.
#
#   HEAD=10.0.0.1 NODES=2 bash scripts/multinode.sh \
#       --model_name_or_path M --dataset my.jsonl --bf16 --output_dir /shared/out
#
# torchrun meets at HEAD:PORT and gives out the ranks. --output_dir must lie on a disk that all machines share.
#   GPUS   processes on this machine; default: as many as it has GPUs
#   PORT   29500
#   NODES  how many machines, or a range as in 1:2: the run starts once no more than that come within 30 s
# A machine or process that is lost ends the run on all others within a minute; a line says which (of HEAD itself, its
# address). The same command goes on from the last checkpoint, on as many machines as there are: the effective batch
# stays what it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
here=" $(hostname -I 2>/dev/null || true) " # torchrun itself knows HEAD only where the machine's name leads to it

# Where HEAD falls silent torchrun ($$, below) goes on reading from it, and does not see that its processes have ended.
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
