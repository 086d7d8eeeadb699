#!/usr/bin/env bash
# Stop the vLLM servers of this host that ./start_vllm.sh started: with TERM, and KILL after 15 seconds.
#
#   ./stop_vllm.sh
#
# Succeeds if none is running. Signals no other process.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by another shell, as in: sh stop_vllm.sh
! (return 0 2>/dev/null) || { echo "error: stop_vllm.sh is to be started, not sourced" >&2 && return 2; }
set -euo pipefail +o posix

# shellcheck source=scripts/lib.sh
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/lib.sh"

stop_servers vllm vllm "vLLM servers" "./stop_vllm.sh" "$@"
