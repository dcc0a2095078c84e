#!/usr/bin/env bash
# 28 small architectures × baseline and ledger, 600 steps of 16 × 256 bytes of Python source each, several runs at once on one GPU; then packed, fitted, predicted.
# After TIME_LIMIT seconds no run starts, after GRACE more those that still train are ended; whole runs are packed, and the same command goes on with the others.
# To try it on a CPU: PAIRS=2 STEPS=32 JOBS=1 DEVICE=cpu BLOCK=64 BATCH=4 OUT=out/tiny_sweep PACKED=out/tiny_sweep/sweep.jsonl bash results/emergence/sweep.sh
set -eu
export PAIRS=${PAIRS:-28} STEPS=${STEPS:-600} DEVICE=${DEVICE:-cuda} DATASET=${DATASET:-pysource_demo} BLOCK=${BLOCK:-256} BATCH=${BATCH:-16}
export OUT=${OUT:-out/sweep} TIME_LIMIT=${TIME_LIMIT:-300} OMP_NUM_THREADS=1
JOBS=${JOBS:-12} GRACE=${GRACE:-60} PACKED=${PACKED:-results/emergence/sweep.jsonl}

mkdir -p "$OUT"
if [ "$DATASET" = pysource_demo ] && [ ! -f data/pysource_demo/train.bin ]; then  # once, not by every worker
  python -c 'from data.pysource import prepare; prepare.main(prepare.DEMO)'
fi
for folder in "$OUT"/*/; do  # what an interrupted sweep left half trained starts again
  if [ -d "$folder" ] && [ ! -f "$folder/run.json" ]; then rm -r "$folder"; fi
done
for _ in $(seq "$JOBS"); do
  timeout $((TIME_LIMIT + GRACE)) python results/emergence/sweep.py &
done
wait
whole=$(ls -d "$OUT"/*/run.json) || { echo "error: no run of the sweep ended: see $OUT/*.txt" >&2; exit 1; }
mkdir -p "$(dirname "$PACKED")"
python emergence.py --pack $(dirname $whole) --out="$PACKED"
