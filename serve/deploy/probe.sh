#!/usr/bin/env bash
# Probes of a container: `probe.sh ready` and `probe.sh alive`; exit code 0 is yes.
#
# ready: the launcher's ready file is there. So a real request was answered and the canary was right; the file goes at
#        once when the engine dies, hangs or is to stop, while the engine's own /health goes on saying 200.
# alive: no, if the launcher says ready and the server does not answer: the launcher should have seen that, so it hangs
#        itself. While the model is loaded, started again or drained it is yes: that must not be broken off.

set -euo pipefail
READY_FILE=${READY_FILE:-/run/antangelmed/ready.json}
TIMEOUT_SECONDS=5

# answers HOST PORT: whether /health there says 200. With bash alone: it must not cost what starting Python costs.
answers() {
  local status
  exec {server}<>"/dev/tcp/$1/$2" && printf 'GET /health HTTP/1.0\r\n\r\n' >&"$server" &&
    read -r _ status _ <&"$server" && [[ $status == 200 ]]
}

case ${1:-} in
ready) [[ -e $READY_FILE ]] ;;
alive)
  address=$(sed -n 's|.*"base_url": "http://\([^/]*\)/.*|\1|p' "$READY_FILE" 2>/dev/null) || exit 0
  host=${address%:*}
  host=${host#[}
  export -f answers
  timeout "$TIMEOUT_SECONDS" bash -c 'answers "$@"' -- "${host%]}" "${address##*:}" 2>/dev/null ||
    { [[ ! -e $READY_FILE ]] || { printf '%s is there, and nothing answers at %s\n' "$READY_FILE" "$address" && exit 1; }; }
  ;;
*) printf 'usage: probe.sh ready|alive\n' >&2 && exit 2 ;;
esac
