#!/usr/bin/env bash
# Everything this project wants from a card, in one command of at most 8 minutes: is it right, then how fast is it.
#   perf/gpu.sh [--device cuda] [--model ling-flash] [--layers 4] [--out perf/results]
# Needs Python 3.10 to 3.12 with a CUDA build of torch 2.11 or newer, transformers, numpy, safetensors, tqdm; no vLLM and no
# network. pytest and hypothesis for the tests. Leaves one result file for each measurement in --out, named after date and
# device, and prints what failed. Every step has a time limit and writes what it has when that ends it.
# --device npu does the same on a 910B, so that the files can be compared; --device cpu --model tiny shows that it runs.

set -uo pipefail
ROOT=$(cd -P -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1

device=cuda model=ling-flash layers=4 out=$ROOT/perf/results
while [[ $# -gt 0 ]]; do
  case $1 in
  --device | --model | --layers | --out)
    [[ $# -ge 2 ]] || { echo "error: $1 needs a value" >&2 && exit 2; }
    printf -v "${1#--}" '%s' "$2"
    shift 2
    ;;
  *) echo "error: unknown argument '$1'; known are --device, --model, --layers and --out" >&2 && exit 2 ;;
  esac
done
if [[ -n ${PYTHON:-} ]]; then python=$PYTHON; elif [[ $device == cpu && -x $ROOT/.venv/bin/python ]]; then python=$ROOT/.venv/bin/python; else python=python3; fi
mkdir -p "$out" && out=$(cd -P -- "$out" && pwd) || exit 2
scratch=$(mktemp -d) && trap 'rm -rf "$scratch"' EXIT
cd -- "$ROOT" || exit 2

if ! name=$("$python" -c "from ascend.devices import get_device; from ascend.errors import run_command
import sys; sys.exit(run_command(lambda: print(get_device(sys.argv[1]).name())))" "$device"); then exit 2; fi
shape=$(basename -- "$model")
label=$(date -u +%F)-$(tr -cs 'A-Za-z0-9\n' - <<<"$name" | tr '[:upper:]' '[:lower:]' | sed 's/-*$//')
echo "$name; $("$python" --version); torch $("$python" -c 'import torch; print(torch.__version__)')"
# A model of fewer layers is for measuring one card; tiny and small are measured whole.
[[ $model == ling-* ]] && cut=(--layers "$layers") || cut=()
[[ $device == cpu ]] && walk=(--walk-bytes 20000000) || walk=() # caches are measured then: it only shows that it runs

failed=()
DEADLINE=460 # seconds, with 10 more to write what there is
# step SECONDS NAME COMMAND…: run it within the time, remember if it failed.
step() {
  local seconds=$1 what=$2 begin=$SECONDS
  shift 2
  ((seconds <= DEADLINE - SECONDS)) || seconds=$((DEADLINE - SECONDS))
  ((seconds > 0)) || { failed+=("$what (no time was left)") && return; }
  printf '\n== %s\n' "$what"
  timeout --signal=INT --kill-after=10 "$seconds" "$@" || failed+=("$what (exit code $?)")
  printf '   %d s\n' $((SECONDS - begin))
}

step 60 "tests on the card" "$python" -m pytest -q -m "gpu or npu" -p no:cacheprovider tests/test_ops_gpu.py tests/test_devices.py
"$python" -m convert demo "$scratch/bf16" --size tiny >/dev/null && "$python" -m convert demo "$scratch/fp32" --size tiny --dtype fp32 >/dev/null
for dtype in fp32 bf16; do
  step 45 "the model on the card against the CPU, $dtype" \
    "$python" -m perf parity live cpu "$device" --model "$scratch/$dtype"
done
# The ops of a card without kernels of its own wait for the host, so nothing can be captured: --eager until they are there.
step 170 "decode against stock transformers" "$python" -m perf decode --device "$device" --model "$model" "${cut[@]}" \
  --engines lean,transformers --batch 1,8,32 --rounds 3 --new-tokens 32 --eager --out "$out/$label-decode-$shape.json"
step 170 "single ops against measured rates" "$python" -m perf ops --device "$device" --model "$model" "${walk[@]}" \
  --tokens 1,8,32,128 --rounds 3 --eager --out "$out/$label-ops-$shape.json"

printf '\nresults in %s\n' "$out"
[[ ${#failed[@]} -eq 0 ]] || { printf 'FAILED: %s\n' "${failed[@]}" && exit 1; }
