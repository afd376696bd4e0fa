#!/usr/bin/env bash
# The GPU part of the families: networks without skips and norms on text and images, and ConvMixers whose depthwise
# filters are frozen, in commands of under ten minutes. It has not been run on a GPU: only its syntax was checked. With
# DEVICE=cpu and SMALL=1, as in the second line below, it is a check of itself on a few items.
#
#   OUT=benchmarks/results/gpu_families benchmarks/gpu_families.sh    # run again until it prints "complete"
#   DEVICE=cpu OUT=/tmp/families_tiny TEXT=README.md IMAGES=digits SEEDS=1 EPOCHS=1 SMALL=1 benchmarks/gpu_families.sh
#
# OUT      where results go, and where a later call goes on from
# BUDGET   seconds this call may take, the end of a step and the report excepted
# TEXT     wikitext-103 (needs the package datasets and a network, or its cache), or a file, folder or pattern
# IMAGES   cifar10, cifar10-jpeg75.tar.xz, a folder, or digits
# MODEL    the language model; SEEDS, EPOCHS, WINDOWS (an epoch's, of text), CONTEXT, BATCH
# SMALL    1 trains on a few items of each data set: does the script work at all
# ONLY     names of the comparisons to run, of: text vit convmixer convmixer_frozen
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-benchmarks/results/gpu_families}
BUDGET=${BUDGET:-540}
TEXT=${TEXT:-wikitext-103}
IMAGES=${IMAGES:-cifar10}
MODEL=${MODEL:-gpt-tiny}
SEEDS=${SEEDS:-6}
EPOCHS=${EPOCHS:-50}
WINDOWS=${WINDOWS:-25600}
CONTEXT=${CONTEXT:-128}
BATCH=${BATCH:-64}
DEVICE=${DEVICE:-cuda}
SMALL=${SMALL:-0}
ONLY=${ONLY:-text vit convmixer convmixer_frozen}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
SKIPLESS=default,value-skipinit,e-spa-no-norms,e-spa-no-skips-no-norms,no-skips-no-norms
began=$SECONDS

left() { echo $((BUDGET - SECONDS + began)); }

[ "$DEVICE" = cpu ] || "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "torch finds no CUDA device: nothing was measured" >&2
  exit 1
}
mkdir -p "$OUT"
text=(--dataset "text:$TEXT" --model "$MODEL" --context "$CONTEXT" --train-images "$WINDOWS" --batch-size "$BATCH")
pictures=(--dataset "$IMAGES")
if [ "$SMALL" = 1 ]; then
  text=(--dataset "text:$TEXT" --model "$MODEL" --context 16 --train-images 8 --test-images 4 --batch-size 4)
  pictures=(--dataset "$IMAGES" --train-images 40 --test-images 20 --batch-size 20)
fi

finished=0 asked=0
compare() { # name, then the arguments of train-compare
  local folder="$OUT/$1"
  case " $ONLY " in *" $1 "*) ;; *) return 0 ;; esac
  shift
  asked=$((asked + 1))
  if [ "$(left)" -le 20 ]; then
    echo "budget spent before $folder: run again to go on"
    return 0
  fi
  local arguments=(train-compare "$@" --seeds "$SEEDS" --epochs "$EPOCHS" --device "$DEVICE" --output "$folder"
    --time-budget "$(left)")
  [ ! -e "$folder/config.json" ] || arguments+=(--resume)
  "$PYTHON" -m attnlens "${arguments[@]}"
  if "$PYTHON" -c 'import json, sys; sys.exit(not json.load(open(sys.argv[1]))["complete"])' "$folder/summary.json"
  then
    finished=$((finished + 1))
  fi
}

compare text "${text[@]}" --arms "$SKIPLESS,mimetic,mimetic-positive,qk-only,norm-matched"
compare vit "${pictures[@]}" --arms "$SKIPLESS"
compare convmixer "${pictures[@]}" --model convmixer-tiny --arms default,conv-covariance,norm-matched
compare convmixer_frozen "${pictures[@]}" --model convmixer-tiny --arms default,conv-covariance,norm-matched \
  --freeze-filters
[ "$finished" = "$asked" ] && echo complete || echo "$finished of $asked comparisons complete: run again to go on"
