#!/usr/bin/env bash
# Usage: bash launch/mpiexec.sh CONFIG [key=value ...]
#
# Starts `brt train` under mpiexec (MPICH, Intel MPI, Open MPI); over several machines once for all of them.
# MPI only starts the processes; they talk through NCCL or gloo.
#
#   HOSTFILE             the machines, one a line, in the format of your MPI; default: this machine alone
#   NODES                how many machines; default: the lines of HOSTFILE
#   PROCESSES_PER_NODE   default: one for each GPU of this machine, 1 where there is none
#   MASTER_ADDR          name or address of the machine of rank 0; default: the first of HOSTFILE
#   MASTER_PORT          a port that is free there; default 29500, on one machine any
set -euo pipefail

case "${1:-}" in
    "") sed -n 's/^# Usage/usage/p' "$0" >&2; exit 2 ;;
    -h | --help) sed -n '/^set/q; s/^#$//p; s/^# //p' "$0"; exit 0 ;;
esac

refuse() {
    echo "mpiexec.sh: $1" >&2
    exit 2
}

hosts=()
if [ -n "${HOSTFILE:-}" ]; then
    [ -r "$HOSTFILE" ] || refuse "HOSTFILE is $HOSTFILE, which cannot be read"
    # Names alone: what follows them is "node1:8" in one MPI and "node1 slots=8" in another.
    mapfile -t hosts < <(sed -n 's/^[[:space:]]*\([^#:[:space:]]\{1,\}\).*/\1/p' "$HOSTFILE")
    [ "${#hosts[@]}" != 0 ] || refuse "HOSTFILE is $HOSTFILE, which names no machine"
    export MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}}
fi
PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
NODES=${NODES:-$((${#hosts[@]} > 1 ? ${#hosts[@]} : 1))}
options=(-n $((NODES * PROCESSES_PER_NODE)))

case "$(mpiexec --version)" in
    *"Open MPI"* | *OpenRTE*)
        # It would bind each process to one core; and elsewhere it passes on only the variables that are named.
        options+=(--bind-to none)
        for name in PATH PYTHONPATH LD_LIBRARY_PATH OMP_NUM_THREADS MASTER_ADDR MASTER_PORT "${!NCCL_@}" "${!GLOO_@}"; do
            [ -z "${!name+set}" ] || options+=(-x "$name")
        done
        [ "${#hosts[@]}" = 0 ] || options+=(--hostfile "$HOSTFILE" --map-by "ppr:$PROCESSES_PER_NODE:node")
        ;;
    *)
        [ "${#hosts[@]}" = 0 ] || options+=(-f "$HOSTFILE" -ppn "$PROCESSES_PER_NODE")
        ;;
esac

# By its whole path: another machine may find another `python` first.
exec mpiexec "${options[@]}" "$(command -v python)" -m brt_dist train "$@"
