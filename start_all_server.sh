#!/usr/bin/env bash
# Start the agent servers of this host, and return when all of them answer.
#
#   ./start_all_server.sh <server_per_host> [flags]
#   ./start_all_server.sh --help-all
#   ./start_all_server.sh --status
#
# Participant servers listen on BASE_PORT and the ports after it, moderator servers on the ports after those.
# They run until ./stop_all_server.sh. --status shows a row per server: port, pid, start time, agents, memory.
# --help-all lists the flags.
#
# Settings, from the environment or configs/cluster.env:
#   BASE_PORT         first port (12330)
#   HOSTS             the hosts, separated by spaces ("localhost"); requests to models on them bypass proxies
#   HOST_NAME         name by which other hosts reach this host (localhost)
#   MODERATOR_NUM     moderator servers (4)
#   MODEL_PER_HOST    model servers on every host (one per GPU of this one, at least 1)
#   VLLM_BASE_PORT    their first port (8010)
#   AGENT_TYPE        llm imports the language model client once for all servers; otherwise each server does on first use
#   CLUSTER_KEY_DIR   folder of the cluster key (.cluster)
#   EXTRA_PYTHONPATH  folders, separated by colons, of modules that your own participants import
#   PYTHON            the Python to install with, 3.11 or 3.12
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by another shell, as in: sh start_all_server.sh
! (return 0 2>/dev/null) || { echo "error: start_all_server.sh is to be started, not sourced" >&2 && return 2; }
set -euo pipefail +o posix

# shellcheck source=scripts/lib.sh
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/lib.sh"

USAGE="./start_all_server.sh <server_per_host>, such as ./start_all_server.sh 10, or --status, or --help, or --help-all"

main() {
  local hosts
  case "${1:-}" in
    -h | --help) show_help && return ;;
    --status) ;;
    --help-all)
      [ "$#" -eq 1 ] || fail 2 "--help-all takes no other arguments; usage: ./start_all_server.sh --help-all"
      ensure_venv run
      exec "$VENV/bin/python" "$ROOT/main.py" --role participant --help
      ;;
    -[!0-9]*) refuse_mistyped "$1" "$USAGE" --status --help --help-all ;;
  esac
  [ "${1:-}" = --status ] || need_numbers "$USAGE" server_per_host "$@"
  load_settings
  if [ "$1" = --status ]; then
    FLAGS=(--status)
    flag --host-name "${HOST_NAME:-}"
  else
    FLAGS=(--server-per-host "$1")
    read -r -a hosts <<<"${HOSTS:-}"
    [ "${#hosts[@]}" -eq 0 ] || FLAGS+=(--hosts "${hosts[@]}") # requests to them bypass proxies
    flag --base-port "${BASE_PORT:-}"
    flag --host-name "${HOST_NAME:-}"
    flag --moderator-per-host "${MODERATOR_NUM:-${MODERATOR_PER_HOST:-}}"
    model_flags
    flag --agent-type "${AGENT_TYPE:-}"
    flag --extra-pythonpath "${EXTRA_PYTHONPATH:-}"
  fi
  flag --cluster-key-dir "${CLUSTER_KEY_DIR:-}"
  shift
  ensure_venv run
  exec "$VENV/bin/python" "$ROOT/main.py" --role participant "${FLAGS[@]}" "$@"
}

main "$@"
