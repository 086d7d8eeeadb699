#!/usr/bin/env bash
# Stop the agent servers of this host that ./start_all_server.sh started: with TERM, and KILL after 5 seconds.
#
#   ./stop_all_server.sh
#
# Succeeds if none is running. Signals no other process.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by another shell, as in: sh stop_all_server.sh
! (return 0 2>/dev/null) || { echo "error: stop_all_server.sh is to be started, not sourced" >&2 && return 2; }
set -euo pipefail +o posix

# shellcheck source=scripts/lib.sh
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/lib.sh"

stop_servers participant servers "agent servers" "./stop_all_server.sh" "$@"
