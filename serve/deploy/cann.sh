#!/usr/bin/env bash
# Run a command in CANN's environment: `cann.sh COMMAND…`. The image of vLLM-Ascend does the same in its own entry point.
# No `set -eu`: the vendor's scripts read variables that are not set.

ASCEND=${ASCEND_ROOT:-/usr/local/Ascend}

# load FILE ARGUMENT…: source it; within a function, so that it does not see the command as its own arguments.
load() {
  local file=$1
  shift
  # shellcheck source=/dev/null
  source "$file" "$@" && return
  printf 'error: %s failed: is CANN with NNAL installed below %s? ASCEND_ROOT names another place\n' "$file" "$ASCEND" >&2
  exit 2
}

load "$ASCEND/ascend-toolkit/set_env.sh"
compiler=${ASCEND_TOOLKIT_HOME:-$ASCEND/ascend-toolkit/latest}/share/info/ascendnpu-ir/bin/set_env.sh # what triton-ascend compiles with
[[ ! -r $compiler ]] || load "$compiler"
load "$ASCEND/nnal/atb/set_env.sh" --cxx_abi=1
exec "$@"
