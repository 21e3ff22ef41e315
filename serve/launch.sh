#!/usr/bin/env bash
# Start vLLM on this model: `serve/launch.sh --help`. Makes the Python environment if need be, then runs serve/launch.py.

ANTANGELMED_STARTED_AT=$(date +%s.%N)
export ANTANGELMED_STARTED_AT
# shellcheck source=serve/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"

# The device decides which environment: ours is for the CPU; the engine for a card is the user's to bring.
device=auto
previous=
only_asking=
emulate=
for argument in "$@"; do
  case $argument in
  --) break ;;
  -h | --help) only_asking=yes ;;
  --emulate) emulate=yes ;;
  --device=*) device=${argument#*=} ;;
  *) [[ $previous == --device ]] && device=$argument ;;
  esac
  previous=$argument
done
if [[ $device == auto ]] && { compgen -G '/dev/davinci[0-9]*' || compgen -G '/dev/nvidia[0-9]*'; } >/dev/null; then
  device=card
fi

if [[ $emulate && $device == npu && ! $only_asking ]]; then
  if ! (VENV=$ROOT/.venv.npu && is_stamped emulated); then
    use_any_python
    "$ENV_PYTHON" -m serve.preflight "$@" || exit
  fi
  use_emulated_environment
elif [[ $only_asking || $device != cpu && $device != auto ]]; then
  use_any_python
elif is_stamped serve; then
  use_environment serve
else
  # A mistake in the flags or the model is told before the first installation, not after it.
  use_any_python
  "$ENV_PYTHON" -m serve.preflight "$@" || exit
  use_environment serve
fi
exec "$ENV_PYTHON" -m serve launch "$@"
