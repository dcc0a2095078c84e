#!/usr/bin/env bash
# 28 small architectures × baseline and ledger, 600 steps of 16 × 256 bytes of Python source each, several runs at once on each GPU; then packed.
# After TIME_LIMIT seconds no run starts, after GRACE more those that still train are ended; whole runs are packed, and the same command goes on with the others.
# To try it on a CPU: PAIRS=2 STEPS=32 JOBS=1 DEVICE=cpu BLOCK=64 BATCH=4 RUNS=out/tiny_sweep PACKED=out/tiny_sweep/sweep.jsonl bash studies/sweep.sh
set -eu
cd "$(dirname "$0")/../.."
export PAIRS=${PAIRS:-28} STEPS=${STEPS:-600} DEVICE=${DEVICE:-cuda} DATASET=${DATASET:-pysource_demo} BLOCK=${BLOCK:-256} BATCH=${BATCH:-16}
export RUNS=${RUNS:-out/sweep} TIME_LIMIT=${TIME_LIMIT:-420} OMP_NUM_THREADS=1
PYTHON=${PYTHON:-python} JOBS=${JOBS:-8} GPUS=${GPUS:-0} GRACE=${GRACE:-100} PACKED=${PACKED:-results/emergence/sweep.jsonl}  # JOBS: on each of GPUS, "0 1"

mkdir -p "$RUNS"
if [ "$DATASET" = pysource_demo ] && [ ! -f data/pysource_demo/train.bin ]; then  # once, not by every worker
  "$PYTHON" -c 'from data.pysource import prepare; prepare.main(prepare.DEMO)'
fi
for folder in "$RUNS"/{baseline,ledger}_*x*_h*_m*/; do  # what an interrupted sweep left half trained starts again
  if [ -d "$folder" ] && [ ! -f "$folder/run.json" ]; then rm -r "$folder"; fi
done
for _ in $(seq "$JOBS"); do
  for gpu in $GPUS; do CUDA_VISIBLE_DEVICES=$gpu timeout -k 30 $((TIME_LIMIT + GRACE)) "$PYTHON" results/emergence/sweep.py & done
done
wait
whole=$(ls -d "$RUNS"/*/run.json) || { echo "error: no run of the sweep ended: see $RUNS/*.txt" >&2; exit 1; }
echo "$(wc -w <<< "$whole") of $((2 * PAIRS)) runs are whole"
mkdir -p "$(dirname "$PACKED")"
"$PYTHON" emergence.py --pack $(dirname $whole) --out="$PACKED"
"$PYTHON" -c 'import json, sys; from bench import machine; print(json.dumps({"command": sys.argv[1], "runs": int(sys.argv[2]), **machine()}, indent=1))' \
  "PAIRS=$PAIRS STEPS=$STEPS BLOCK=$BLOCK BATCH=$BATCH DATASET=$DATASET JOBS=$JOBS GPUS=\"$GPUS\" bash studies/sweep.sh" "$(wc -w <<< "$whole")" > "${PACKED%.jsonl}_recipe.json"
