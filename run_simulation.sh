#!/usr/bin/env bash
# Play a game: ask participants for a number, announce the result, and name the winners.
#
#   ./run_simulation.sh <server_per_host> <participant_num> [flags]
#   ./run_simulation.sh --resume <folder of a run, or of an experiment's runs> [flags]
#   ./run_simulation.sh --experiment <file> [flags]
#   ./run_simulation.sh --install-only
#   ./run_simulation.sh --help-all
#
# On one machine without agent servers it starts them, and stops them at the end. Otherwise it uses those that
# ./start_all_server.sh started on every host. Results are in runs/latest. Flags go to main.py; --help-all lists them.
# --quiet prints only results, warnings and errors; --json prints only summary.json, of an experiment an array of them.
# --resume continues a run after its last finished round, also on other hosts and servers; settings given here replace
# those of the run. --experiment plays the settings of a YAML file, one run for each combination of the values in lists;
# a flag overrides the file.
#
# The first run installs into .venv. --install-only does only that, for example on a machine with access to a package
# index for others that share the checkout and have none.
#
# Settings, from the environment or configs/cluster.env:
#   BASE_PORT           first port of the agent servers on every host (12330)
#   HOSTS               the hosts, separated by spaces ("localhost")
#   MODERATOR_PER_HOST  moderator servers on every host, as started (4)
#   AGENT_TYPE          random, or llm: participants ask the models of configs/model_configs.json; ignored with --players
#   MODEL_PER_HOST      model servers on every host (one per GPU of this one, at least 1)
#   VLLM_BASE_PORT      their first port (8010)
#   MAX_VALUE           upper bound of the numbers (100)
#   CLUSTER_KEY_DIR     folder of the cluster key (.cluster)
#   EXTRA_PYTHONPATH    folders, separated by colons, of modules that your own participants import, on every host
#   PYTHON              the Python to install with, 3.11 or 3.12
# All scripts ignore other variables of Python, such as PYTHONPATH.
#
# Exit status: 0 every participant answered, 2 bad usage, settings or files, 3 cluster not ready,
# 4 participants unanswered, 5 results not written, 130 interrupted, 129 hangup, 143 terminated, 1 a defect.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by another shell, as in: sh run_simulation.sh
! (return 0 2>/dev/null) || { echo "error: run_simulation.sh is to be started, not sourced" >&2 && return 2; }
set -euo pipefail +o posix

# shellcheck source=scripts/lib.sh
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/lib.sh"

USAGE="./run_simulation.sh <server_per_host> <participant_num> [flags], or --experiment <file> [flags],"
USAGE="$USAGE or --resume <folder> [flags], or --help, or --help-all;"
USAGE="$USAGE ./run_simulation.sh 10 1000 plays with 1000 participants on 10 agent servers of each host"

main() {
  local word
  case "${1:-}" in --resume=* | --experiment=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
  case "${1:-}" in
    -h | --help) show_help && return ;;
    --help-all)
      [ "$#" -eq 1 ] || fail 2 "--help-all takes no other arguments; usage: ./run_simulation.sh --help-all"
      ensure_venv run
      exec "$VENV/bin/python" "$ROOT/main.py" --help
      ;;
    --install-only)
      [ "$#" -eq 1 ] || fail 2 "--install-only takes no other arguments; usage: ./run_simulation.sh --install-only"
      load_settings
      ensure_venv run
      say "$VENV is up to date"
      return
      ;;
    --resume | --experiment) ;;
    -[!0-9]*)
      for word in "${@:2}"; do
        case "${word%%=*}" in --resume | --experiment) fail 2 "${word%%=*} comes first; usage: $USAGE" ;; esac
      done
      refuse_mistyped "$1" "$USAGE" --resume --experiment --install-only --help --help-all
      ;;
  esac
  load_settings
  if [ "${1:-}" = --resume ]; then
    [ -n "${2:-}" ] || fail 2 "--resume needs the folder of a run, such as runs/latest"
    FLAGS=(--resume "$2")
    AGENT_TYPE="" MAX_VALUE="" # the game is the same
  elif [ "${1:-}" = --experiment ]; then
    [ -n "${2:-}" ] || fail 2 "--experiment needs a YAML file, such as those in configs/experiments"
    FLAGS=(--experiment "$2")
    AGENT_TYPE="" MAX_VALUE="" # the file defines the game
  else
    need_numbers "$USAGE" "server_per_host participant_num" "$@"
    FLAGS=(--server-per-host "$1" --participant-num "$2")
    for word in "${@:3}"; do
      case "$word" in
        --resume | --resume=* | --experiment | --experiment=*) AGENT_TYPE="" MAX_VALUE="" ;;
        --players | --players=*) AGENT_TYPE="" ;; # of the two, the flag says who plays
      esac
    done
  fi
  shift 2
  local hosts
  read -r -a hosts <<<"${HOSTS:-}"
  [ "${#hosts[@]}" -eq 0 ] || FLAGS+=(--hosts "${hosts[@]}")
  flag --base-port "${BASE_PORT:-}"
  flag --moderator-per-host "${MODERATOR_PER_HOST:-${MODERATOR_NUM:-}}"
  model_flags
  flag --agent-type "${AGENT_TYPE:-}"
  flag --max-value "${MAX_VALUE:-}"
  flag --cluster-key-dir "${CLUSTER_KEY_DIR:-}"
  flag --extra-pythonpath "${EXTRA_PYTHONPATH:-}"
  ensure_venv run
  exec "$VENV/bin/python" "$ROOT/main.py" "${FLAGS[@]}" "$@"
}

main "$@"
