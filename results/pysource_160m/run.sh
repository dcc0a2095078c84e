#!/usr/bin/env bash
# The 160m arms on Python source in GPT-2's BPE: one seed, 101M tokens each, a whole cosine; then all of them measured,
# untrained weights included. On two GPUs about 15 minutes; with one, GPUS="0 0". To try it on a CPU:
#   python data/pysource/prepare.py --stdlib --tokenizer=bytes --limit=2M --out=data/tiny
#   SCALE=demo ITERS=20 DATASET=tiny bash results/pysource_160m/run.sh
set -eu
SCALE=${SCALE:-160m} ITERS=${ITERS:-4100} DATASET=${DATASET:-pysource} SEED=${SEED:-1337}
read -r first second <<< "${GPUS:-0 1}"

queue() {  # a GPU, then the arms that it trains one after the other; 143: a run that was told to stop, and goes on
  export CUDA_VISIBLE_DEVICES=$1
  shift
  for arm; do
    until python train.py "config/${arm}_$SCALE.py" --dataset="$DATASET" --max_iters="$ITERS" --seed="$SEED" --snapshots=0 --init_from=auto \
      >> "out/${arm}_$SCALE.txt" 2>&1; do [ $? = 143 ]; done
  done
}

mkdir -p out
queue "$first" baseline qknorm & one=$!
queue "$second" ledger ledger_hs & other=$!
wait $one
wait $other
python measure.py --ckpt out/*_"$SCALE"/ckpt.pt | tee out/measure.txt
python measure.py --ckpt out/*_"$SCALE"/ckpt_0.pt --out=out/untrained | tee out/untrained.txt
