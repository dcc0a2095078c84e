#!/usr/bin/env bash
# The comparison at 160M: trains arms and seeds over the GPUs, measures each run and its untrained weights, and packs what is small. It goes on where it stopped:
# a run that is packed, or lies beside this file, is skipped; one that was interrupted resumes from its checkpoint.
#
#   bash studies/recipe.sh                                                        four arms, one seed, 101M tokens each, on two GPUs
#   SEEDS="1338 1339" bash studies/recipe.sh                                      other seeds
#   ARMS="baseline_bias ledger_a0 ledger_a0.1 baseline_short2800" bash …                     the positive control, other doses of α, a whole cosine of 2800 steps
#   ARMS="ledger_ramp64" bash …                                                              the ledger whose C starts as the last D
#   LIMIT=550 TGZ=$OUT/packed.tgz bash …                                                     stops by itself after so many seconds; all that is packed, in one file
#
# To try it on a CPU: python data/pysource/prepare.py --stdlib --tokenizer=bytes --limit=2M --out=data/tiny
#   SCALE=demo ITERS=30 DATASET=tiny GPUS="" bash studies/recipe.sh
set -uo pipefail
cd "$(dirname "$0")/../.."
SCALE=${SCALE:-160m}     # 160m, 290m or demo: config/<arm>_<scale>.py
ITERS=${ITERS:-4100}     # steps of a whole cosine; at 160m, 24 × 1024 tokens each
EVERY=${EVERY:-250}      # steps between evaluations, each a line of log.jsonl
ARMS=${ARMS:-ledger baseline ledger_hs qknorm}
SEEDS=${SEEDS:-1337}     # all arms of the first seed come before the next
QUEUE=${QUEUE:-$(for seed in $SEEDS; do for arm in $ARMS; do echo "$arm.$seed"; done; done)} # or any runs in any order: "ledger_hs.1338 ledger_a0.1.1337"
CLOSER=${CLOSER:-1337}   # the seed whose baseline and ledger go through intervene.py and probe.py as well, and whose untrained weights through controls.py
TOOLS=${TOOLS-intervene probe onset} # the closer look; "" for none
SEQUENCES=${SEQUENCES:-64} # of intervene.py
GPUS=${GPUS-0 1}         # a run at a time on each; "0 0" puts two on one, which at 160m gains nothing; "" is the CPU
DATASET=${DATASET:-pysource}
SNAPSHOTS=${SNAPSHOTS:-0} # iterations whose weights are kept: 0, for the untrained model; with five that are evaluated, results/emergence/onset.py looks at them
EXTRA=${EXTRA:-}         # settings for every run, like "--lr=6e-4": then RUNS and PACK of their own, and a folder of their own beside this one
RUNS=${RUNS:-out}        # checkpoints
PACK=${PACK:-out/packed} # <arm>_<scale>_<seed>/: log.jsonl, measure.json, controls.json, with _0 for the untrained weights, figures, recipe.json
TGZ=${TGZ:-}             # a file that always holds all of PACK
LIMIT=${LIMIT:-0}        # seconds; 0: none
KEEP_FREE=${KEEP_FREE:-20} # GB: with less free on the disk, a packed run's newest checkpoint goes as well
PYTHON=${PYTHON:-python}
HERE=results/pysource_160m
export PYTHONUNBUFFERED=1

flags_of() {  # the config of an arm, and the settings that make it what its name says
  case $1 in
    baseline_bias) echo "baseline --max_iters=$ITERS --attn_bias_kv=True" ;;
    baseline_short[0-9]*) echo "baseline --max_iters=${1#baseline_short}" ;;
    ledger_a[0-9]*) echo "ledger --max_iters=$ITERS --commit_sparsity=${1#ledger_a}" ;;
    ledger_ramp[0-9]*) echo "ledger --max_iters=$ITERS --commit_ramp=${1#ledger_ramp}" ;;
    *) echo "$1 --max_iters=$ITERS" ;;
  esac
}

within() {  # runs a command in what is left of LIMIT; train.py takes SIGTERM as the request to save and end
  local left=0
  if [ "$LIMIT" -gt 0 ]; then left=$((LIMIT - SECONDS)) && [ $left -gt 0 ] || return 124; fi
  timeout --foreground -k 30 $left "$@" < /dev/null
}

logged() {  # run, then a command: its output goes to <run>/console.txt; itself, its seconds and its exit status to <run>/commands.txt
  local run=$1 begin=$SECONDS status
  shift
  within "$@" >> "$RUNS/$run/console.txt" 2>&1
  status=$?
  echo "$((SECONDS - begin)) s, exit $status: $*" >> "$RUNS/$run/commands.txt"
  if [ $status != 0 ]; then
    echo "$run: exit $status of $*"
    tail -n 3 "$RUNS/$run/console.txt"
  fi
  return $status
}

is_packed() { [ -e "$PACK/$1/recipe.json" ] || [ -z "$EXTRA" -a -e "$HERE/$1/recipe.json" ]; }

archive() {  # replaced as a whole, by one worker at a time
  [ -z "$TGZ" ] || ( flock 9; tar -C "$PACK" --exclude='./.*' -czf "$TGZ.tmp" . && mv "$TGZ.tmp" "$TGZ" ) 9> "$PACK/.lock"
}

describe() {  # what made a run: commands with seconds and exit status, commit (COMMIT where there is no git), versions, machine, data
  "$PYTHON" - "$RUNS/$1/commands.txt" "${COMMIT:-$(git describe --always --dirty 2> /dev/null || echo unknown)}" "$DATASET" <<'PYTHON'
import json, platform, sys
import numpy, torch
from data.loader import dataset_folder, read_meta
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
print(json.dumps({'commands': open(sys.argv[1]).read().splitlines(), 'commit': sys.argv[2], 'python': platform.python_version(), 'torch': torch.__version__,
                  'numpy': numpy.__version__, 'device': gpu, 'data': read_meta(dataset_folder(sys.argv[3]))}, indent=1))
PYTHON
}

pack() {  # a run appears under its name only when it is whole
  local run=$1 part="$PACK/.$1.$BASHPID"
  rm -rf "$PACK/.$run."*
  mkdir -p "$part"
  cp "$RUNS/$run/"{log.jsonl,measure{,_0}.json,controls*.json,profile{,_0}.png,landscape.png,series.png} "$part" && describe "$run" > "$part/recipe.json" &&
    sync "$part"/* && mv -T "$part" "$PACK/$run" || { rm -rf "$part"; return 1; }
  archive
  rm -f "$RUNS/$run/"ckpt_{prev,best}.pt
  [ "$(df --output=avail -BG "$RUNS" | tail -n 1 | tr -dc 0-9)" -ge "$KEEP_FREE" ] || rm -f "$RUNS/$run/"ckpt*.pt
  echo "$SECONDS s: packed $run"
}

add() {  # adds files to a run that is packed, each when it is whole
  local run=$1 file
  shift
  for file; do cp "$file" "$PACK/$run/.new.$BASHPID" && mv "$PACK/$run/.new.$BASHPID" "$PACK/$run/$(basename "$file")"; done
  archive
}

train() {  # arm, seed
  local run=$1_${SCALE}_$2 config flags command
  read -r config flags <<< "$(flags_of "$1")"
  command="train.py config/${config}_$SCALE.py $flags --dataset=$DATASET --seed=$2 --snapshots=$SNAPSHOTS --eval_interval=$EVERY --out_dir=$RUNS/$run $EXTRA"
  mkdir -p "$RUNS/$run"
  if [ -e "$RUNS/$run/command" ] && [ "$(< "$RUNS/$run/command")" != "$command" ]; then
    echo "$run: $RUNS/$run was begun as: $(< "$RUNS/$run/command"): remove it, or give this one RUNS and PACK of its own"
    return 1
  fi
  echo "$command" > "$RUNS/$run/command"
  logged "$run" "$PYTHON" $command --init_from=auto
}

measure_and_pack() {  # arm, seed
  local run=$1_${SCALE}_$2 untrained=
  [ "$2" != "$CLOSER" ] || untrained=$RUNS/$run/ckpt_0.pt
  logged "$run" "$PYTHON" measure.py --ckpt "$RUNS/$run/ckpt.pt" &&
    logged "$run" "$PYTHON" measure.py --ckpt "$RUNS/$run/ckpt_0.pt" &&
    logged "$run" "$PYTHON" $HERE/controls.py --ckpt "$RUNS/$run/ckpt.pt" $untrained && pack "$run"
  touch "$CLAIMS/$1.$2/ended"
}

take() {  # arm, seed: on a GPU the next training need not wait for this one's measurements
  if is_packed "$1_${SCALE}_$2" || ! train "$1" "$2"; then
    touch "$CLAIMS/$1.$2/ended"
  elif [ "$CUDA_VISIBLE_DEVICES" ]; then
    measure_and_pack "$1" "$2" &
  else
    measure_and_pack "$1" "$2"
  fi
}

look_closer() {  # arm, tool: the analyses that one seed is enough for; what one has written is kept although it failed in the end
  local run=$1_${SCALE}_$CLOSER tool=$2 script=$2.py flags=
  case $tool in
    intervene) flags=--sequences=$SEQUENCES ;;
    onset) script=results/emergence/onset.py && [ "$(tr -cd , <<< "$SNAPSHOTS" | wc -c)" -ge 4 ] || return ;;
  esac
  [ -e "$script" ] && [ ! -e "$PACK/$run/$tool.json" ] && [ -e "$RUNS/$run/ckpt.pt" ] || return
  logged "$run" "$PYTHON" "$script" --ckpt "$RUNS/$run" $flags; add "$run" "$RUNS/$run/$tool"*.{png,json}
}

work() {  # a GPU or "": takes what nobody has taken, and waits for the others to end, since there may be something to look at closer
  trap 'exit 143' TERM  # once the command at hand, which is told as well, has ended: a training saves first
  export CUDA_VISIBLE_DEVICES=$1
  local arm run tool claim busy=1
  for run in $QUEUE; do mkdir "$CLAIMS/$run" 2> /dev/null && take "${run%.*}" "${run##*.}"; done
  while [ $busy = 1 ]; do
    busy=0
    for claim in "$CLAIMS"/*.[0-9]*; do [ -e "$claim/ended" ] || busy=1; done
    for arm in baseline ledger; do
      for tool in $TOOLS; do
        [ -e "$PACK/${arm}_${SCALE}_$CLOSER/recipe.json" ] && mkdir "$CLAIMS/closer.$arm.$tool" 2> /dev/null && look_closer "$arm" "$tool"
      done
    done
    [ $busy = 0 ] || sleep 1
  done
}

mkdir -p "$RUNS" "$PACK"
CLAIMS=$(mktemp -d)
set -m  # every worker is a process group: it is stopped with what it runs
stop() { trap - TERM INT EXIT; for job in $(jobs -p); do kill -TERM -- "-$job" 2> /dev/null; done; wait; rm -rf "$CLAIMS"; }
trap 'stop; exit 143' TERM INT
trap stop EXIT
archive
if [ "$DATASET" = pysource ] && [ ! -e data/pysource/train.bin ]; then within "$PYTHON" data/pysource/prepare.py || exit; fi
read -ra gpus <<< "$GPUS"
for gpu in "${gpus[@]:-}"; do work "$gpu" & done
wait
left=0
for run in $QUEUE; do run=${run%.*}_${SCALE}_${run##*.}; is_packed "$run" || { echo "not packed yet: $run"; left=1; }; done
"$PYTHON" $HERE/verdicts.py "$PACK" > "$PACK/.verdicts.$$" && mv "$PACK/.verdicts.$$" "$PACK/verdicts.md" && archive
exit $left
