#!/usr/bin/env bash
# The main job on this machine: real text to tokens, two trained models, and a plot of both. `make quickstart` calls it.
# A second run takes up where the first stopped. RUNS is the folder of the two runs, made by their configurations.
set -euo pipefail
cd "$(dirname "$0")/.."

RUNS=runs/quickstart
CONFIGS=configs/quickstart
SEGMENT=256                                    # data.segment of the configuration
CORES=$(getconf _NPROCESSORS_ONLN)
RANKS=$(( CORES < 2 ? 1 : 2 ))                 # two processes of one thread each
export OMP_NUM_THREADS=1

echo "== 1/4 the source of Python's standard library becomes tokens"
python -m brt_dist prepare "$CONFIGS/recurrent.yaml"

step=2
for model in recurrent baseline; do
    echo "== $step/4 the $model model trains on $RANKS processes"
    torchrun --standalone --nproc-per-node "$RANKS" -m brt_dist train "$CONFIGS/$model.yaml"
    step=$((step + 1))
done

echo "== 4/4 both read every test document from its first to its last token"
figures=$RUNS/evaluation/test-cleared-$SEGMENT.json
if [ -e "${figures%.json}.png" ] && [ -e "$figures" ] && [ "$figures" -nt "$RUNS/recurrent/checkpoints" ] && [ "$figures" -nt "$RUNS/baseline/checkpoints" ]; then
    echo "done before: $figures and the plot beside it"
else
    python -m brt_dist evaluate "$RUNS/recurrent" "$RUNS/baseline" --split test --clear-carry-every "$SEGMENT" \
        --out "$RUNS/evaluation"
fi
