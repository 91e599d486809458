#!/usr/bin/env bash
# Usage: bash launch/deepspeed.sh CONFIG [key=value ...]
#
# Starts `brt train` under DeepSpeed's launcher; over several machines by pdsh and ssh, once for all of them.
#
#   HOSTFILE             the machines, one a line, as in "node1 slots=8"; default: this machine alone
#   NODES                only the first so many of them; default: all
#   PROCESSES_PER_NODE   default: the slots of HOSTFILE; without it one for each GPU, 1 where there is none
#   MASTER_ADDR          name or address of the first machine; default: what `hostname -I` says there
#   MASTER_PORT          a port that is free there; default 29500
set -euo pipefail

case "${1:-}" in
    "") sed -n 's/^# Usage/usage/p' "$0" >&2; exit 2 ;;
    -h | --help) sed -n '/^set/q; s/^#$//p; s/^# //p' "$0"; exit 0 ;;
esac

options=()
if [ -n "${HOSTFILE:-}" ]; then
    # DeepSpeed would only warn, and train on this machine alone.
    if [ ! -r "$HOSTFILE" ]; then
        echo "deepspeed.sh: HOSTFILE is $HOSTFILE, which cannot be read" >&2
        exit 2
    fi
    options+=(--hostfile "$HOSTFILE")
    if [ "$(grep -c '^[[:space:]]*[^#[:space:]]' "$HOSTFILE")" = 1 ]; then
        # DeepSpeed starts the processes of a single host here; all that it would do by ssh is to ask for its name.
        options+=(--no_ssh_check)
        MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
    fi
elif [ -z "${PROCESSES_PER_NODE:-}" ] && [ "$(python -c 'import torch; print(torch.cuda.device_count())')" = 0 ]; then
    # Without a GPU, DeepSpeed would count the memory nodes of the processors.
    PROCESSES_PER_NODE=1
fi
[ -z "${NODES:-}" ] || options+=(--num_nodes "$NODES")
[ -z "${PROCESSES_PER_NODE:-}" ] || options+=(--num_gpus "$PROCESSES_PER_NODE")
[ -z "${MASTER_ADDR:-}" ] || options+=(--master_addr "$MASTER_ADDR")
[ -z "${MASTER_PORT:-}" ] || options+=(--master_port "$MASTER_PORT")

exec deepspeed "${options[@]}" --module brt_dist train "$@"
