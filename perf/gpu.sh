#!/usr/bin/env bash
# What this project wants from a card, in parts of at most 8 minutes: is it right, then how fast is it.
#   perf/gpu.sh [--part correctness|ops|decode|speculation|long|tune|all] [--device cuda] [--model ling-flash]
#               [--layers N] [--seconds 460] [--out perf/results]
# Parts, and what they take at most: correctness 400 s (kernels natively, the model against the CPU, graphs against eager
# steps), ops 440 s (single ops, experts' widths 1024 and 512), decode 450 s (the whole model, a dense one of 36 B, and
# stock transformers on 8 layers), speculation 300 s (drafts, with acceptance forced), long 400 s (attention and decode
# to 128K, prefill of 8K), tune 460 s (tile sizes of the experts' kernels). "all" is all of them within --seconds, which
# is enough on a CPU; on a card give one part for each call.
# The whole model is measured in what fits the card: FP8 from 130 GB, INT4 experts from 75 GB, else 4 layers in BF16.
# --layers cuts it anywhere. Needs Python 3.10 to 3.12 with a CUDA build of torch 2.11 or newer, transformers, numpy,
# safetensors, tqdm; no vLLM and no network. pytest and hypothesis (and xdist, if there) for the tests. Leaves one result
# file for each measurement in --out, named after date and device, and prints what failed. Every step has a time limit
# and writes what it has when that ends it.
# --device npu does the same on a 910B, so that the files can be compared; --device cpu --model tiny shows that it runs.

set -uo pipefail
ROOT=$(cd -P -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1

part=all device=cuda model=ling-flash layers='' seconds=460 out=$ROOT/perf/results
while [[ $# -gt 0 ]]; do
  case $1 in
  --part | --device | --model | --layers | --seconds | --out)
    [[ $# -ge 2 ]] || { echo "error: $1 needs a value" >&2 && exit 2; }
    printf -v "${1#--}" '%s' "$2"
    shift 2
    ;;
  *) echo "error: unknown argument '$1'; known are --part, --device, --model, --layers, --seconds and --out" >&2 && exit 2 ;;
  esac
done
case $part in
correctness | ops | decode | speculation | long | tune | all) ;;
*) echo "error: --part '$part' is none of correctness, ops, decode, speculation, long, tune and all" >&2 && exit 2 ;;
esac
[[ $seconds =~ ^[1-9][0-9]*$ ]] || { echo "error: --seconds '$seconds' is no number of seconds" >&2 && exit 2; }
if [[ -n ${PYTHON:-} ]]; then python=$PYTHON; elif [[ $device == cpu && -x $ROOT/.venv/bin/python ]]; then python=$ROOT/.venv/bin/python; else python=python3; fi
mkdir -p "$out" && out=$(cd -P -- "$out" && pwd) || exit 2
scratch=$(mktemp -d) && trap 'rm -rf "$scratch"' EXIT
cd -- "$ROOT" || exit 2

# The card's name and its memory in GB.
if ! found=$("$python" -c "from ascend.devices import get_device; from ascend.errors import run_command
import sys
def tell():
    device = get_device(sys.argv[1])
    print(device.name(), int(device.memory().total // 10**9), sep='\n')
sys.exit(run_command(tell))" "$device"); then exit 2; fi
name=${found%$'\n'*} memory=${found##*$'\n'}
shape=$(basename -- "$model")
label=$(date -u +%F)-$(tr -cs 'A-Za-z0-9\n' - <<<"$name" | tr '[:upper:]' '[:lower:]' | sed 's/-*$//')
echo "$name, $memory GB; $("$python" --version); torch $("$python" -c 'import torch; print(torch.__version__)')"

# What a card is measured with, and the little that shows that it runs on a CPU.
rounds=3 new=32 tokens=1,8,32,128 batch=1,8,32 context=2048 far=32768,131072 farthest=131072 prompt=8192 drafted=8,32
dense=dense-36b peers=(--engines lean,transformers --layers 8) kv=(--kv fp8) walk=() tune=()
formats=('' fp8 w4a16)
[[ $device == npu* ]] && formats=('' w8a8 w4a16) kv=()
if [[ $model != ling-* || $device == cpu ]]; then # tiny and small are measured whole, and caches with them
  rounds=1 new=16 tokens=1,4 batch=1,3 context=64 far=128,256 farthest=256 prompt=1024 drafted=2
  dense='' peers=(--engines lean,transformers) memory=0 walk=(--walk-bytes 300000) tune=(--one)
fi
# Threads that wait for one another on a busy machine take milliseconds for what one does in none.
threads=()
[[ $device == cpu ]] && threads=(--threads 1) && export OMP_NUM_THREADS=1
((memory < 130)) || { batch=$batch,128 drafted=$drafted,64; }
whole=()
if [[ -n $layers ]]; then
  whole=(--layers "$layers")
elif [[ $model == ling-flash ]]; then
  if ((memory >= 130)) && [[ $device == cuda* ]]; then
    whole=(--quantise fp8)
  elif ((memory >= 75)); then
    whole=(--quantise w4a16)
  else
    whole=(--layers 4)
  fi
fi

failed=()
# step SECONDS NAME COMMAND…: run it within the time, remember if it failed.
step() {
  local limit=$1 what=$2 begin=$SECONDS
  shift 2
  ((limit <= seconds - SECONDS)) || limit=$((seconds - SECONDS))
  ((limit > 0)) || { failed+=("$what (no time was left)") && return; }
  printf '\n== %s\n' "$what"
  timeout --signal=INT --kill-after=10 "$limit" "$@" || failed+=("$what (exit code $?)")
  printf '   %d s\n' $((SECONDS - begin))
}
perf() { # perf SECONDS NAME FILE COMMAND…: a measurement, its result file named so
  step "$1" "$2" "$python" -m perf "${@:4}" --device "$device" --rounds "$rounds" "${threads[@]}" --out "$out/$label-$3-$shape.json"
}

correctness() {
  local many=()
  if [[ $device == cuda* ]]; then
    "$python" -c 'import xdist' 2>/dev/null && many=(-n 12) # a kernel is compiled for each set of its sizes: seconds
    step 240 "kernels, natively" "$python" -m pytest -q -p no:cacheprovider "${many[@]}" tests/triton
  else
    echo "kernels, natively: skipped, $device runs no Triton kernels"
  fi
  step 60 "the card, and graphs against eager steps" "$python" -m pytest -q -rs -m "gpu or npu" -p no:cacheprovider \
    tests/test_gpu.py tests/test_devices.py
  "$python" -m convert demo "$scratch/bf16" --size tiny >/dev/null && "$python" -m convert demo "$scratch/fp32" --size tiny --dtype fp32 >/dev/null
  for dtype in fp32 bf16; do
    step 50 "the model on the card against the CPU, $dtype" \
      "$python" -m perf parity live cpu "$device" --model "$scratch/$dtype"
  done
  step 50 "the model on the card against the CPU, INT4 experts" \
    "$python" -m perf parity live cpu "$device" --model "$scratch/bf16" --quantise w4a16
}
ops() {
  for form in "${formats[@]}"; do
    local flags=(--model "$model" --tokens "$tokens" --context "$context" "${walk[@]}")
    [[ -n $form ]] && flags+=(--quantise "$form")
    perf 90 "single ops ${form:-bf16}" "ops-${form:-bf16}" ops "${flags[@]}"
    [[ $model == ling-flash && $device != cpu ]] &&
      perf 55 "experts of width 512 ${form:-bf16}" "ops-512-${form:-bf16}" ops "${flags[@]}" --width 512 --ops moe,moe_layer
  done
}
decode() {
  local common=(decode --batch "$batch" --new-tokens "$new")
  perf 180 "decode at $context, ${whole[*]:-whole}" decode "${common[@]}" --model "$model" "${whole[@]}" --fill --prompt-length "$context"
  [[ -n $dense && $device == cuda* ]] && perf 110 "decode of a dense 36 B model" decode-dense-36b "${common[@]}" --model "$dense" --quantise fp8 \
    --fill --prompt-length "$context"
  perf 160 "decode against stock transformers" decode-peers "${common[@]}" --model "$model" "${peers[@]}"
}
speculation() {
  local common=(decode --model "$model" "${whole[@]}" --fill --prompt-length "$context" --new-tokens "$new")
  perf 180 "three drafts, 2.84 tokens a step" drafts-3 "${common[@]}" --batch "$drafted" --drafts 3 --acceptance 2.84
  perf 120 "as many drafts as pay" drafts-auto "${common[@]}" --batch "$batch" --drafts auto
}
long() {
  local attention=(ops --model "$model" --tokens 1,8 --context "$far" --ops attention,cached_attention "${walk[@]}")
  perf 80 "attention at $far" attention "${attention[@]}"
  [[ ${#kv[@]} -gt 0 ]] && perf 80 "attention at $far, FP8 cache" attention-fp8 "${attention[@]}" "${kv[@]}"
  perf 120 "decode at $farthest" decode-long decode --model "$model" "${whole[@]}" "${kv[@]}" --batch 1 --new-tokens "$new" \
    --fill --prompt-length "$farthest"
  perf 120 "prefill of $prompt" prefill decode --model "$model" "${whole[@]}" --batch 1 --new-tokens "$new" --prompt-length "$prompt"
}
tune() {
  local form='' interpret=''
  [[ $device == npu* ]] && echo "tune: not on an NPU, its kernels are CANN's" && return
  if [[ $device == cpu ]]; then interpret=1; elif ((memory >= 130)); then form=fp8; else form=w4a16; fi
  step 460 "tile sizes ${form:-bf16}" env ${interpret:+TRITON_INTERPRET=1} "$python" -m perf tune --device "$device" --model "$model" \
    ${form:+--quantise "$form"} --tokens "${tokens%%,*},${tokens##*,}" --seconds $((seconds - SECONDS > 40 ? seconds - SECONDS - 40 : 1)) "${tune[@]}"
}

if [[ $part == all ]]; then
  for one in correctness ops decode speculation long tune; do "$one"; done
else
  "$part"
fi

printf '\nresults in %s\n' "$out"
[[ ${#failed[@]} -eq 0 ]] || { printf 'FAILED: %s\n' "${failed[@]}" && exit 1; }
