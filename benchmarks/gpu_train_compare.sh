#!/usr/bin/env bash
# The GPU part of train-compare: speed ladder, then the accuracy comparison, in commands of under ten minutes.
#
#   OUT=benchmarks/results/gpu benchmarks/gpu_train_compare.sh        # run again until it prints "complete"
#
# OUT      where results go, and where a later call goes on from
# BUDGET   seconds this call may take, the end of a step and the report excepted
# DATA     images: cifar10-jpeg75.tar.xz, a folder, or cifar10
# MODEL    the pre-trained source; empty is the ViT shipped with attnlens
# CLASSES  those of the images that are kept: even, odd or names; empty keeps all
# ARMS, SEEDS, EPOCHS   four arms of three seeds are the 12 runs; six seeds are more than screening
# SAVE     1 keeps the final weights of every run
# NPROC    GPUs on this host, one process each
#
# The ladder: a source on half of the classes, then its parts on the other half.
#   OUT=gpu/source CLASSES=even ARMS=default SEEDS=1 SAVE=1 benchmarks/gpu_train_compare.sh
#   OUT=gpu/ladder CLASSES=odd ARMS=ladder SEEDS=6 MODEL=gpu/source/cifar10/weights/default-0.safetensors \
#     benchmarks/gpu_train_compare.sh
# The source has the sizes of MODEL, or of the shipped ViT.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-benchmarks/results/gpu}
BUDGET=${BUDGET:-540}
DATA=${DATA:-../shared/data/cifar10-jpeg75.tar.xz}
MODEL=${MODEL:-}
CLASSES=${CLASSES:-}
SAVE=${SAVE:-}
ARMS=${ARMS:-default,mimetic,norm-matched-mimetic,pretrained}
SEEDS=${SEEDS:-3}
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

[ "$(left)" -gt 30 ] || { echo "budget spent on the ladder: run again to go on"; exit 0; }
arguments=(train-compare --dataset "$DATA" --arms "$ARMS" --seeds "$SEEDS" --epochs "$EPOCHS" --patch-size 4
  --device cuda --output "$OUT/cifar10" --time-budget "$(left)")
[ -z "$MODEL" ] || arguments+=(--model "$MODEL")
[ -z "$CLASSES" ] || arguments+=(--classes "$CLASSES")
[ -z "$SAVE" ] || arguments+=(--save-weights)
[ ! -e "$OUT/cifar10/config.json" ] || arguments+=(--resume)
if [ "$NPROC" -gt 1 ]; then
  "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m attnlens "${arguments[@]}"
else
  "$PYTHON" -m attnlens "${arguments[@]}"
fi
"$PYTHON" - "$OUT/cifar10/summary.json" <<'END'
import json, pathlib, sys
done = json.loads(pathlib.Path(sys.argv[1]).read_text())["complete"]
print("complete" if done else "not complete: run again to go on")
END
