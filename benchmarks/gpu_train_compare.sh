#!/usr/bin/env bash
# The GPU part of train-compare, in commands of under ten minutes: the speed ladder, a source trained on the even classes
# of CIFAR-10, and the ladder of starts on the odd ones, which that source has never seen. It has not been run on a GPU.
#
#   OUT=benchmarks/results/gpu benchmarks/gpu_train_compare.sh        # run again until it prints "complete"
#
# OUT      where results go, and where a later call goes on from
# BUDGET   seconds this call may take, the end of a step and the report excepted
# DATA     ten classes of images: cifar10-jpeg75.tar.xz, a folder, or cifar10
# SIZES    of the network: ViT-Ti
# SOURCE, TARGET   classes of the source and of the ladder; exchange them, with another OUT, for the second table
# SEEDS, EPOCHS    of the ladder; the source trains as long, once
# NPROC    GPUs on this host, one process each, for the ladder
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-benchmarks/results/gpu}
BUDGET=${BUDGET:-540}
DATA=${DATA:-../shared/data/cifar10-jpeg75.tar.xz}
SIZES=${SIZES:---embed-dim 192 --depth 12 --num-heads 3}
SOURCE=${SOURCE:-even}
TARGET=${TARGET:-odd}
SEEDS=${SEEDS:-6}
EPOCHS=${EPOCHS:-100}
NPROC=${NPROC:-1}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
began=$SECONDS

left() { echo $((BUDGET - SECONDS + began)); }

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "torch finds no CUDA device: nothing was measured" >&2
  exit 1
}
mkdir -p "$OUT"
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv,noheader > "$OUT/device.txt" || true

for patch in 4 2; do
  "$PYTHON" -m benchmarks.train_speed --patch-size "$patch" --output "$OUT/speed_patch$patch.json" \
    --time-budget $(($(left) / 3))
done

compare() { # a folder, the number of processes, then what is its own among the arguments of train-compare
  local folder="$OUT/$1" processes=$2
  shift 2
  [ "$(left)" -gt 30 ] || { echo "budget spent before $folder: run again to go on"; exit 0; }
  local arguments=(train-compare --dataset "$DATA" --patch-size 4 --epochs "$EPOCHS" --device cuda "$@"
    --output "$folder" --time-budget "$(left)")
  [ ! -e "$folder/config.json" ] || arguments+=(--resume)
  if [ "$processes" -gt 1 ]; then
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$processes" -m attnlens "${arguments[@]}"
  else
    "$PYTHON" -m attnlens "${arguments[@]}"
  fi
  "$PYTHON" -c 'import json, sys; sys.exit(not json.load(open(sys.argv[1]))["complete"])' "$folder/summary.json" || {
    echo "$folder is not complete: run again to go on"
    exit 0
  }
}

read -ra sizes <<< "$SIZES"
compare "source_$SOURCE" 1 --classes "$SOURCE" --arms default --seeds 1 --save-weights "${sizes[@]}"
compare "ladder_$TARGET" "$NPROC" --classes "$TARGET" --arms ladder --seeds "$SEEDS" \
  --model "$OUT/source_$SOURCE/weights/default-0.safetensors"
echo complete
