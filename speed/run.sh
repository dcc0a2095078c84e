#!/usr/bin/env bash
# What speed has to show on one GPU by itself, in less than four minutes. Every step has a limit, and one that
# fails does not stop the next. What comes out lies in results/speed/, its names beginning with CARD.
#
#   CARD=h100 bash speed/run.sh                    bench_24, tests and bench_64
#   STEPS="first_step measure" bash speed/run.sh   other steps, from the list at the end
#   STEPS=scale bash speed/run.sh                  on a machine of several GPUs: 290m on 1, 2, 4 …
#
# To try it on a CPU:
#   SCALE=demo OUT=/tmp/speed PYTHON=python \
#     MORE="--steps=1 --n_layer=1 --block_size=32 --compile=False" bash speed/run.sh
set -uo pipefail
cd "$(dirname "$0")/.."
STEPS=${STEPS:-bench_24 tests bench_64}
OUT=${OUT:-results/speed}
CARD=${CARD:-gpu}
SCALE=${SCALE:-160m}
MORE=${MORE:-} # flags for every bench of training
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
mkdir -p "$OUT"
ARMS=baseline,ledger,ledger/arm=rotated_commit

step() { # name, seconds, command: its output goes to a file, and the end of it to the console
  local name=$1 limit=$2 begin=$SECONDS log="$OUT/${CARD}_$1.txt"
  shift 2
  echo "\$ $*" > "$log"
  timeout -k 10 "$limit" "$@" >> "$log" 2>&1 < /dev/null
  echo "== $name: exit $?, $((SECONDS - begin)) s"
  tail -n 9 "$log"
}

bench() { # name, seconds, flags
  local name=$1 limit=$2
  shift 2
  # shellcheck disable=SC2086
  step "$name" "$limit" "$PYTHON" -m speed.bench --scale="$SCALE" "$@" $MORE --out="$OUT/${CARD}_$name.json"
}

for what in $STEPS; do
  case $what in
    # The published step, float32 streams, with what an evaluation costs; compiling takes most of it.
    bench_24) bench bench_24 110 --arms="$ARMS" --batch_size=24 --turns=5 --skip_cold_starts ;;
    # 64 sequences a step, bfloat16 streams.
    bench_64) bench bench_64 80 --arms=baseline,ledger --bf16_streams=True --turns=5 --skip_cold_starts ;;
    # From the start of a process to its first step, with cold caches and with warm ones; and the same where
    # PyTorch may also keep what it has traced of the kernels.
    first_step) bench first_step 150 --arms=ledger --batch_size=24 --turns=1 --steps=1 ;;
    first_step_kept)
      export TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD=1
      bench first_step_kept 150 --arms=ledger --batch_size=24 --turns=1 --steps=1
      unset TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD ;;
    tests) step tests 110 "$PYTHON" -m pytest -q -x -m gpu tests/test_kernels.py --durations=5 ;;
    # Every test that needs a GPU.
    all_tests) step all_tests 240 "$PYTHON" -m pytest -q -m gpu tests --durations=15 ;;
    measure) bench measure 60 --what=measure --arms=baseline,ledger --turns=3 ;;
    scale) bench scale 400 --what=scale --arms=baseline,ledger --batch_size=32 --turns=3 ;;
    *) echo "there is no step $what" ;;
  esac
done
