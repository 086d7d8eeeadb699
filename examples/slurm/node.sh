#!/usr/bin/env bash
# One node's part of examples/slurm/simulation.sbatch: start its servers, print a line when they are ready, and stop them
# when the input ends. Pid files, locks and logs belong to one node, so the scripts run from a copy on its own disk. The
# copy uses the environments installed in the shared checkout. Logs are copied back to run/slurm-<job>/<node>/.
#
#   examples/slurm/node.sh <server_per_host>
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by another shell, as in: sh node.sh
! (return 0 2>/dev/null) || { echo "error: node.sh is to be started, not sourced" >&2 && return 2; }
set -euo pipefail +o posix

main() {
  local checkout
  [ -n "${SLURM_JOB_ID:-}" ] && [ -n "${SLURMD_NODENAME:-}" ] ||
    { echo "error: submit it with sbatch examples/slurm/simulation.sbatch, which starts this on each node" >&2; exit 2; }
  checkout="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd -P)"
  export HOST_NAME="$SLURMD_NODENAME"
  trap 'exit 143' TERM INT
  COPY="$(mktemp -d "${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/simulation-$SLURM_JOB_ID.XXXXXX")"
  LOGS="$checkout/run/slurm-$SLURM_JOB_ID/$HOST_NAME"
  trap finish EXIT
  cd "$checkout"
  cp -R ./*.py ./*.sh ./*.txt pyproject.toml configs games scripts simulation "$COPY"
  ln -s "$checkout"/.venv* "$COPY"
  if [ "${AGENT_TYPE:-}" = llm ]; then in_background "$COPY/start_vllm.sh"; fi
  in_background "$COPY/start_all_server.sh" "$1"
  echo "$HOST_NAME is ready"
  in_background cat
}

# Run a command in the background and wait for it: a signal interrupts `wait`, but not a command in the foreground.
in_background() {
  "$@" <&0 >&2 &
  JOB=$!
  wait "$JOB"
}

finish() {
  trap '' TERM INT
  if kill "${JOB:-}" 2>/dev/null; then wait "$JOB" || true; fi
  "$COPY/stop_all_server.sh" >&2 || true
  [ "${AGENT_TYPE:-}" != llm ] || "$COPY/stop_vllm.sh" >&2 || true
  mkdir -p "$LOGS"
  [ ! -d "$COPY/run" ] || find "$COPY/run" -name '*.log' -exec cp {} "$LOGS" \;
  rm -rf "$COPY"
}

main "$@"
