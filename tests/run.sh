#!/usr/bin/env bash
# Check everything, in the environment that serve/env.sh makes:
#   tests/run.sh                all tests (the same as `tests/run.sh all`), ruff and mypy
#   tests/run.sh quick          ruff, mypy and the tests that start no engine
#   tests/run.sh npu ARGUMENT…  only the tests on emulated Ascend cards
#   tests/run.sh npu-serve ARGUMENT…  only the real vllm-ascend on emulated cards, in an environment of its own
#   tests/run.sh triton ARGUMENT…  only those of the Triton kernels, on Triton's interpreter
#   tests/run.sh ARGUMENT…      only pytest, with these arguments

# shellcheck source=serve/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../serve/env.sh"
use_environment serve test
cd -- "$ROOT"

on_cpu() { "$ENV_PYTHON" -m pytest --ignore tests/npu --ignore tests/npu_serve --ignore tests/npu_launch --ignore tests/triton "$@"; }

on_vllm_ascend() {
  local status=0
  # In a shell of its own: its environment is another one.
  (use_emulated_environment test && exec "$ENV_PYTHON" -m ascend.emulator -- "$ENV_PYTHON" -m pytest tests/npu_serve "$@") ||
    status=$?
  "$ENV_PYTHON" -m pytest tests/npu_launch "$@" || { [[ $? == 5 ]] || status=1; } # 5: none of them was chosen
  return "$status"
}

on_npu() { "$ENV_PYTHON" -m ascend.emulator -- "$ENV_PYTHON" -m pytest tests/npu "$@"; }

on_interpreter() { TRITON_INTERPRET=1 "$ENV_PYTHON" -m pytest tests/triton "$@"; }

case ${1:-all} in
all | quick)
  [[ $# -le 1 ]] || die "'$1' takes no further arguments: give pytest's alone"
  failed=()
  "$ENV_PYTHON" -m ruff check . || failed+=("ruff check")
  "$ENV_PYTHON" -m ruff format --check . || failed+=("ruff format")
  status=0
  # Three processes: torch_npu changes torch for all that run beside it, and Triton decides once whether it interprets.
  beside=$(mktemp) && trap 'rm -f "$beside"' EXIT
  {
    "$ENV_PYTHON" -m mypy && on_npu -m "not slow" && on_interpreter -m "not slow" && on_cpu -m "not slow" tests/test_[a-c]*.py
  } >"$beside" 2>&1 &
  on_cpu -m "not slow" tests/test_[d-z]*.py || status=$?
  wait $! || failed+=("mypy, tests/npu, tests/triton or those that ran behind them")
  cat "$beside"
  if [[ ${1:-all} == all ]]; then
    { on_npu -m slow && on_interpreter -m slow && on_cpu -m "slow and beside" tests/test_[a-n]*.py; } >"$beside" 2>&1 &
    on_cpu -m "slow and beside" tests/test_[o-z]*.py || status=$?
    wait $! || failed+=("slow ones of tests/npu or tests/triton, or those that ran beside them")
    cat "$beside"
    on_cpu -m "slow and not beside" || status=$? # by themselves: some of them measure time
  fi
  # pytest's line stays the last one of a good run; a bad one says all that is bad.
  [[ ${#failed[@]} -eq 0 ]] || { printf 'failed: %s\n' "${failed[@]}" >&2 && exit $((status ? status : 1)); }
  exit "$status"
  ;;
npu) on_npu "${@:2}" ;;
npu-serve) on_vllm_ascend "${@:2}" ;;
triton) on_interpreter "${@:2}" ;;
*) exec "$ENV_PYTHON" -m pytest "$@" ;;
esac
