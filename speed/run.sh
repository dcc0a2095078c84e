#!/usr/bin/env bash
# What speed has to show, on one GPU by itself: about a quarter of an hour; `two` needs two. Every step has a limit, and what fails does not stop the next.
#
#   bash speed/run.sh                       all; what comes out lies beside this file
#   STEPS="tests tiles" OUT=/tmp/x bash …          some steps, elsewhere
#
# To try it on a CPU: python data/pysource/prepare.py --stdlib --tokenizer=bytes --limit=2M --out=data/tiny
#   SCALES=demo DATASET=tiny STEPS="bench measure loss train two" MORE="--turns=2 --steps=1 --batch_size=2 --compile=False" MEASURE="--sequences=16 --turns=1" TRAIN=--max_iters=3 \
#     LOSS="--steps=3 --runs=kernels=False;kernels=False,micro_batch=4" TWO="--turns=1 --steps=1 --batch_size=4 --device=cpu" OUT=/tmp/h200 bash speed/run.sh
set -uo pipefail
cd "$(dirname "$0")/../.."
STEPS=${STEPS:-tests tiles bench measure loss train}
OUT=${OUT:-results/h200}
SCALES=${SCALES:-160m 290m}
DATASET=${DATASET:-pysource}  # of the steps that need real tokens
MORE=${MORE:-}                # flags for every bench.py of training
MEASURE=${MEASURE:-}          # flags for bench.py --what=measure
LOSS=${LOSS:-}                # and for same_loss.py
TWO=${TWO:---batch_size=128 --bf16_streams=True}
PYTHON=${PYTHON:-python}
TRAIN=${TRAIN:---max_iters=300 --log_interval=50 --eval_interval=1000 --eval_sequences=64}
export PYTHONUNBUFFERED=1
mkdir -p "$OUT"

step() {  # name, seconds, command: its output goes to <name>.txt and, in short, to the console
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  echo "\$ $*" > "$OUT/$name.txt"
  timeout -k 20 "$limit" "$@" >> "$OUT/$name.txt" 2>&1 < /dev/null
  echo "== $name: exit $?, $((SECONDS - begin)) s"
  tail -n 8 "$OUT/$name.txt"
}

case $STEPS in *loss* | *train* | *two*) [ "$DATASET" != pysource ] || [ -e data/pysource/train.bin ] || step prepare 100 "$PYTHON" data/pysource/prepare.py ;; esac
for what in $STEPS; do
  case $what in
    tests) step tests 400 "$PYTHON" -m pytest -q -m gpu tests ;;
    tiles) step tiles 300 "$PYTHON" speed/tiles.py --out="$OUT/tiles.json" ;;
    bench)
      for scale in $SCALES; do
        step "bench_${scale}_bf16" 300 "$PYTHON" bench.py --scale="$scale" --arms=baseline,ledger,ledger/kernels=False --bf16_streams=True $MORE --out="$OUT/bench_${scale}_bf16.json"
        step "bench_$scale" 300 "$PYTHON" bench.py --scale="$scale" --arms=baseline,ledger $MORE --out="$OUT/bench_$scale.json"
      done ;;
    measure) step bench_measure 200 "$PYTHON" bench.py --what=measure --scale="${SCALES%% *}" $MEASURE --out="$OUT/bench_measure.json" ;;
    loss) step same_loss 400 "$PYTHON" results/h200/same_loss.py --config="config/ledger_${SCALES%% *}.py" --dataset="$DATASET" $LOSS --out="$OUT/same_loss.json" ;;
    two)  # 64 sequences on each, and the loss of one run on one process and on two
      for scale in $SCALES; do
        step "two_$scale" 200 torchrun --standalone --nproc_per_node=2 bench.py --scale="$scale" $TWO --out="$OUT/two_$scale.json"
      done
      for n in 1 2; do
        step "loss_on_$n" 200 torchrun --standalone --nproc_per_node=$n results/h200/same_loss.py --config="config/ledger_${SCALES##* }.py" --dataset="$DATASET" --steps=100 --runs="kernels=True" \
          --out="$OUT/loss_on_$n.json"
      done ;;
    train)  # train.py on real tokens, to be held against the bench of the same batch
      for arm in baseline ledger; do
        step "train_$arm" 120 "$PYTHON" train.py "config/${arm}_${SCALES%% *}.py" --dataset="$DATASET" --batch_size=64 --bf16_streams=True $TRAIN --out_dir="out/speed_$arm"
        rm -rf "out/speed_$arm"
      done ;;
  esac
done
