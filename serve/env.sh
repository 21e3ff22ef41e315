# shellcheck shell=bash disable=SC2034
# The Python environment, for serve/launch.sh and tests/run.sh: `source` this file, then call `use_environment PART…`
# with the parts `serve` and `test`, or `use_emulated_environment PART…` with `test`. It sets ENV_PYTHON. Nothing is
# installed twice: a stamp in .venv, written last, says which lock files it was made from.

set -euo pipefail

ROOT=$(cd -P -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)
VENV=$ROOT/.venv
OLDEST_PYTHON=11 NEWEST_PYTHON=12 # of the lock files
ENV_PYTHON=
export PYTHONSAFEPATH=1 # a file in the user's directory must not pass for a module
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}

say() { printf '%s\n' "$*" >&2; }

die() {
  say "error: $*"
  exit 2
}

# lock_files PART…: the lock files of the parts, one a line.
lock_files() {
  local part
  for part in "$@"; do
    case $part in
    serve) printf '%s\n' "$ROOT/requirements/cpu.lock.txt" "$ROOT/requirements/engine-cpu.lock.txt" ;;
    emulated) printf '%s\n' "$ROOT/requirements/cpu.lock.txt" "$ROOT/requirements/npu-emulated.lock.txt" ;;
    test) printf '%s\n' "$ROOT/requirements/test.lock.txt" ;;
    esac
  done
}

# stamp_of PART: what the environment of this part is made from, as one word.
stamp_of() {
  local files
  mapfile -t files < <(lock_files "$1")
  { printf '%s\n' "$ROOT" && cat -- "${files[@]}" "$ROOT/setup.py" "$VENV/pyvenv.cfg"; } 2>/dev/null | sha256sum | cut -d' ' -f1
}

# is_stamped PART…: whether .venv is finished for all of the parts.
is_stamped() {
  local part stamp
  [[ -x $VENV/bin/python && ! -e $VENV.unfinished ]] || return 1
  for part in "$@"; do
    read -r stamp 2>/dev/null <"$VENV/stamp-$part" || return 1
    [[ $stamp == "$(stamp_of "$part")" ]] || return 1
  done
}

# find_python OLDEST MODULE…: prints the first Python from 3.OLDEST to the newest that really runs and has the modules.
find_python() {
  local candidate
  while IFS= read -r candidate; do
    if [[ -n $candidate ]] && "$candidate" -c "import sys, importlib.util as util
sys.exit(not (3, $1) <= sys.version_info[:2] <= (3, $NEWEST_PYTHON) or not all(map(util.find_spec, sys.argv[1:])))" "${@:2}" 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done < <(if [[ -n ${PYTHON:-} ]]; then type -P -- "$PYTHON"; else type -aP python3.11 python3.12 python3.10 python3; fi || true)
  return 1
}

# active_python: prints the interpreter of the environment the user has activated, if it is not .venv.
active_python() {
  local active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
  [[ -n $active && ! $active -ef $VENV && -x $active/bin/python ]] && printf '%s\n' "$active/bin/python"
}

# use_any_python: for what needs the standard library alone, and for devices whose engine the user brings: in an image
# of vllm-ascend it lies in the system's own Python, which is one of several there.
use_any_python() {
  ENV_PYTHON=$(active_python) || ENV_PYTHON=$(find_python 10 vllm) || { is_stamped serve && ENV_PYTHON=$VENV/bin/python; } ||
    ENV_PYTHON=$(find_python 10) || { [[ -x $VENV/bin/python ]] && ENV_PYTHON=$VENV/bin/python; } ||
    die "no Python 3.10, 3.11 or 3.12 found${PYTHON:+ as PYTHON=$PYTHON}: install one, or set PYTHON to its path"
}

# use_environment PART…: the active environment if it holds exactly what the lock files say, else .venv, made if need be.
use_environment() {
  local python files problem=
  mapfile -t files < <(lock_files "$@")
  if python=$(active_python); then
    if problem=$("$python" "$ROOT/serve/locked.py" "${files[@]}" 2>&1); then
      ENV_PYTHON=$python
      return
    fi
  fi
  ENV_PYTHON=$VENV/bin/python
  is_stamped "$@" && return
  [[ -z $problem ]] || say "the active environment is not the locked one (${problem##*$'\n'}): using $VENV"
  make_environment "$@"
}

# use_emulated_environment PART…: the real vllm-ascend for emulated cards, which wants other releases beside it: always
# an environment of its own.
use_emulated_environment() {
  VENV=$ROOT/.venv.npu NEWEST_PYTHON=11
  export TORCH_DEVICE_BACKEND_AUTOLOAD=0 # outside of the emulator the torch-npu in it would look for CANN
  ENV_PYTHON=$VENV/bin/python
  is_stamped emulated "$@" || make_environment emulated "$@"
}

make_environment() {
  local part file problem files lock_fd
  command -v flock >/dev/null || die "the command flock is missing: install util-linux"
  { exec {lock_fd}<>"$VENV.lock"; } 2>/dev/null || die "$ROOT cannot be written to, and $VENV is not ready for use"
  if ! flock -n "$lock_fd"; then
    say "waiting for another start (pid $(cat "$VENV.lock")) that is preparing $VENV"
    flock "$lock_fd"
  fi
  trap 'say "interrupted: the next start begins the installation afresh"; exit 130' INT
  if ! is_stamped "$@"; then
    printf '%s\n' "$$" >"$VENV.lock"
    make_venv
    mapfile -t files < <(lock_files "$@")
    for file in "${files[@]}"; do
      problem=$("$VENV/bin/python" "$ROOT/serve/locked.py" "$file") ||
        pip_install "what requirements/${file##*/} names (first: $problem)" -r "$file"
    done
    pip_install "this project's entry for vLLM" --no-build-isolation -e "$ROOT"
    problem=$("$VENV/bin/python" "$ROOT/serve/locked.py" "${files[@]}") || die "$VENV is not as locked: $problem"
    rm -f -- "$VENV.unfinished" # there while an installation is under way, and after one that was broken off
    for part in "$@"; do
      stamp_of "$part" >"$VENV/stamp-$part.new"
      mv -f -- "$VENV/stamp-$part.new" "$VENV/stamp-$part"
    done
  fi
  trap - INT
  exec {lock_fd}>&- # so that the server does not hold the lock
}

# make_venv: leaves an environment that runs, and the mark that tells the next start if we are broken off.
make_venv() {
  local base
  if [[ -e $VENV.unfinished ]]; then
    say "the last installation into $VENV was broken off: starting afresh"
  elif "$VENV/bin/python" -c 'import sys, pip; sys.exit(not (3, '$OLDEST_PYTHON') <= sys.version_info[:2] <= (3, '$NEWEST_PYTHON'))' 2>/dev/null; then
    : >"$VENV.unfinished"
    return
  fi
  base=$(find_python "$OLDEST_PYTHON" venv ensurepip) ||
    die "no Python 3.$(seq -s ' or 3.' "$OLDEST_PYTHON" "$NEWEST_PYTHON") with venv found${PYTHON:+ as PYTHON=$PYTHON}: install one (Debian: python3-venv), or set PYTHON"
  : >"$VENV.unfinished"
  say "making $VENV with $base"
  "$base" -m venv --clear "$VENV" || die "$base could not make an environment in $VENV"
}

# pip_install WHAT ARGUMENT…: with pip's own progress on a terminal, else in silence. PIP_* variables hold as ever.
pip_install() {
  local what=$1 log=$VENV/install.log begin=$SECONDS pip
  shift
  say "installing $what"
  : >"$log"
  pip=("$VENV/bin/python" -m pip install --no-deps --disable-pip-version-check --log "$log" "$@")
  if [[ -t 2 ]]; then
    "${pip[@]}" >&2 || pip_failed "$what" "$log"
  else
    "${pip[@]}" --quiet >/dev/null 2>&1 || pip_failed "$what" "$log"
  fi
  say "  done in $((SECONDS - begin)) s"
}

# pip_failed WHAT LOG: one line with what pip said first and what to do.
pip_failed() {
  local reason remedy
  reason=$(sed -n 's/.*ERROR: //p' "$2" | head -n 1)
  case $reason in
  *torch==*+cpu*)
    remedy="set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels, or PIP_FIND_LINKS to a directory that holds this wheel" ;;
  *"No space left"*) remedy="make room, about 4 GB" ;;
  *)
    remedy="check the network or PIP_INDEX_URL; without a network set PIP_NO_INDEX=1 and PIP_FIND_LINKS to the wheels' directory" ;;
  esac
  die "pip could not install $1: ${reason:-no reason given}; $remedy; log: $2"
}
