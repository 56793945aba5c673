#!/usr/bin/env bash
# Trains on several GPUs: tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
# On several nodes, run it on every one: NNODES=2 NODE_RANK=0 MASTER_ADDR=10.1.1.1 tools/dist_train.sh CONFIG GPUS_PER_NODE
# Without a GPU it starts as many CPU processes.
# MAX_RESTARTS=3 tools/dist_train.sh CONFIG GPUS --resume auto: when a process dies, all start again, up to three times, from the last checkpoint.
set -euo pipefail
if [ $# -lt 2 ]; then sed -n '2,5s/^# //p' "$0" >&2; exit 1; fi
config=$1 processes=$2
shift 2
nodes=${NNODES:-1} node=${NODE_RANK:-0} restarts=${MAX_RESTARTS:-0} address=${MASTER_ADDR:-127.0.0.1} port=${PORT:-29500}
meeting=(--node_rank="$node" --master_addr="$address" --master_port="$port")
if [ "$nodes" != 1 ] && [ "$restarts" != 0 ]; then
    # Nodes that start again must meet again, which torchrun's default rendezvous cannot; node 0 is the meeting point. The
    # store is a new one each time: in one that is kept, gloo finds the addresses of processes that are gone.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    meeting=(--rdzv-backend=c10d --rdzv-endpoint="$address:$port" --rdzv-conf="is_host=$((node == 0))" --rdzv-id=revcol_mm)
fi
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="$nodes" --nproc_per_node="$processes" --max-restarts="$restarts" "${meeting[@]}" \
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@"
