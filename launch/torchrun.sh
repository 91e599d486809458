#!/usr/bin/env bash
# Usage: bash launch/torchrun.sh CONFIG [key=value ...]
#
# Starts `brt train` under torchrun. Over several machines: the same command once on each of them.
#
#   PROCESSES_PER_NODE   default: one for each GPU of this machine, 1 where there is none
#   NODES                how many machines; default 1
#   NODE_RANK            the number of this machine, from 0       } must be set
#   MASTER_ADDR          name or address of machine 0             } where NODES
#   MASTER_PORT          a port that is free there; default 29500 } is not 1
set -euo pipefail

case "${1:-}" in
    "") sed -n 's/^# Usage/usage/p' "$0" >&2; exit 2 ;;
    -h | --help) sed -n '/^set/q; s/^#$//p; s/^# //p' "$0"; exit 0 ;;
esac

refuse() {
    echo "torchrun.sh: $1" >&2
    exit 2
}

PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
NODES=${NODES:-1}

if [ "$NODES" = 1 ]; then
    # Finds a free port by itself, so that several runs can share the machine.
    meeting=(--standalone)
else
    [ -n "${NODE_RANK:-}" ] || refuse "NODES is $NODES: set NODE_RANK to the number of this machine, from 0"
    [ -n "${MASTER_ADDR:-}" ] || refuse "NODES is $NODES: set MASTER_ADDR to the name or address of machine 0"
    # Numbered machines, so that which ranks share a machine does not depend on which of them was ready first.
    meeting=(--nnodes "$NODES" --node-rank "$NODE_RANK"
        --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi

exec torchrun "${meeting[@]}" --nproc-per-node "$PROCESSES_PER_NODE" -m brt_dist train "$@"
