#!/usr/bin/env bash
# Run a script of the checkout on all hosts in parallel over ssh, or copy the cluster key of this host to all hosts.
#
#   ./on_all_hosts.sh <script> [arguments]      such as ./on_all_hosts.sh start_all_server.sh 10
#   ./on_all_hosts.sh push-key [--force]
#
# Every host needs its own checkout, in the same folder as here. The script runs there with HOST_NAME set to the host's
# name in HOSTS, and with the settings of the environment here. Each line of output starts with the name of its host.
# push-key creates the cluster key here if there is none, and copies it to every host; a host that has another key keeps
# it, unless --force is given.
#
# ssh must log in without a password. A host's key is accepted the first time and checked afterwards. Ctrl-C ends the
# ssh sessions; a script that has started may still finish on its host.
#
# Settings, from the environment or configs/cluster.env:
#   HOSTS            the hosts, separated by spaces (required)
#   REMOTE_DIR       folder of the checkout on every host (the folder of this one)
#   SSH_CONFIG       ssh configuration to use instead of your own: ports, users, identities
#   CLUSTER_KEY_DIR  folder of the cluster key (.cluster)
#
# Exit status: 0 every host succeeded, 2 bad usage or settings, 130 interrupted, 143 terminated; otherwise the highest
# of all hosts. A host that ssh cannot reach or loses, or whose login shell does not run the script, counts as 3.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by another shell, as in: sh on_all_hosts.sh
! (return 0 2>/dev/null) || { echo "error: on_all_hosts.sh is to be started, not sourced" >&2 && return 2; }
set -euo pipefail +o posix

# shellcheck source=scripts/lib.sh
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/lib.sh"

USAGE="./on_all_hosts.sh <script> [arguments], or push-key [--force], or --help"
SCRIPTS=(run_simulation.sh start_all_server.sh stop_all_server.sh start_vllm.sh stop_vllm.sh run_tests.sh)
SSH=(ssh -T -o BatchMode=yes -o StrictHostKeyChecking=accept-new -o ConnectTimeout=10 -o ServerAliveInterval=10)
INPUT="</dev/null" # standard input of the script on a host, in sh syntax
HOST_LIST=()
SESSIONS=() # the process of ssh to each host
OUTPUTS=()  # the process that writes the output of each host
STATUS="[exit status $$-$RANDOM$RANDOM] " # marks the line with a host's exit status

main() {
  local what="${1:-}" words="" word key
  case "$what" in
    -h | --help) show_help && return ;;
    '') fail 2 "a script is missing; usage: $USAGE" ;;
    push-key) case "$#${2:-}" in 1 | 2--force) ;; *) fail 2 "push-key knows --force alone; usage: $USAGE" ;; esac ;;
    *)
      what="./${what#./}"
      [[ "$what" =~ ^\./[^/]+\.sh$ && "$what" != ./on_all_hosts.sh && -x "$ROOT/$what" ]] ||
        refuse_unknown "$1" "$USAGE" push-key --help "${SCRIPTS[@]}"
      ;;
  esac
  for word in $SETTINGS; do # before configs/cluster.env is read: each host has its own
    case "$word" in HOST_NAME | REMOTE_DIR | SSH_CONFIG) continue ;; esac
    [ -z "${!word:-}" ] || words="$words $word=$(quoted "${!word}")"
  done
  for word in "$what" "${@:2}"; do words="$words $(quoted "$word")"; done
  load_settings
  check_hosts
  if [ "$what" = push-key ]; then
    prepare_key
    key="${CLUSTER_KEY_DIR:-.cluster}"
    on_all "set -- $(quoted_path "${key#"$ROOT/"}") ${2:-}
$(cat "$ROOT/scripts/receive_key.sh")"
  else
    word="$(quoted "$what")"
    on_all "[ -x $word ] || { echo 'error: there is no' $word in \"\$PWD\" >&2; exit 2; }
exec env$words"
  fi
}

# Quote a word for sh.
quoted() { printf '%s\n' "$1" | sed "s/'/'\\\\''/g; 1s/^/'/; \$s/\$/'/"; }

# Quote a path on a host for any shell; ~ or ~user at its start is a home folder there.
quoted_path() {
  local start="${1%%/*}"
  case "${start#\~}" in
    "$start" | *[!A-Za-z0-9._-]*) quoted "$1" ;;
    *) printf '%s' "$start" && { [ "$start" = "$1" ] || printf '/%s' "$(quoted "${1#*/}")"; } ;;
  esac
}

check_hosts() {
  local host
  read -r -a HOST_LIST <<<"${HOSTS:-}"
  [ "${#HOST_LIST[@]}" -gt 0 ] || fail 2 "HOSTS names no host: set it in configs/cluster.env, such as HOSTS=node1 node2"
  for host in "${HOST_LIST[@]}"; do
    case "$host" in -* | *[!A-Za-z0-9._:-]*) fail 2 "HOSTS: '$host' is no name of a host" ;; esac
    [ "$(printf '%s\n' "${HOST_LIST[@]}" | grep -cixF -e "$host")" -eq 1 ] || fail 2 "HOSTS names $host twice"
  done
  command -v ssh >/dev/null || fail 2 "ssh is missing: install it (Debian: apt install openssh-client)"
  expand_home SSH_CONFIG
  [ -z "${SSH_CONFIG:-}" ] || [ -r "$SSH_CONFIG" ] || fail 2 "SSH_CONFIG=$SSH_CONFIG cannot be read"
  [ -z "${SSH_CONFIG:-}" ] || SSH+=(-F "$SSH_CONFIG")
}

# Set the input of each host: the certificate, an empty line and the key.
prepare_key() {
  local folder
  flag --cluster-key-dir "${CLUSTER_KEY_DIR:-}"
  ensure_venv run
  folder="$("$VENV/bin/python" "$ROOT/main.py" --role participant --make-key ${FLAGS[@]+"${FLAGS[@]}"})"
  INPUT="$(echo '<<"END OF THE KEY"' && cat "$folder/cluster.crt" && echo && cat "$folder/cluster.key")
END OF THE KEY"
}

# Run commands on all hosts. They go through ssh's input to /bin/sh: all users of a host can read command lines, and each
# login shell has different rules for special characters.
on_all() { # on_all <commands for sh in the folder of the checkout>
  local folder="${REMOTE_DIR:-$ROOT}" enter host index status highest=0 failures=0 failed=""
  enter="$(quoted "error: there is no folder $folder: clone the checkout there, or set REMOTE_DIR")"
  enter="cd $(quoted_path "$folder") 2>/dev/null || { echo $enter >&2; exit 2; }"
  WORK="$(mktemp -d)"
  trap 'rm -rf "$WORK"' EXIT
  trap 'interrupted 130' INT
  trap 'interrupted 143' TERM HUP
  for host in "${HOST_LIST[@]}"; do
    mkfifo "$WORK/$host.out" "$WORK/$host.err"
    # sh runs the commands in braces only after it has read all of them
    printf '{\n(\n%s\n) %s\necho %s $?\n}\n' \
      "$enter; HOST_NAME=$host; export HOST_NAME; $1" "$INPUT" "$(quoted "$STATUS")" |
      "${SSH[@]}" "$host" /bin/sh >"$WORK/$host.out" 2>"$WORK/$host.err" &
    SESSIONS+=($!)
    named "$host" "$WORK/$host.status" <"$WORK/$host.out" &
    OUTPUTS+=($!)
    named "$host" /dev/null <"$WORK/$host.err" >&2 &
  done
  for index in "${!SESSIONS[@]}"; do
    host="${HOST_LIST[index]}"
    status=0
    wait "${SESSIONS[index]}" || status=$?
    wait "${OUTPUTS[index]}" || true
    if [ -s "$WORK/$host.status" ]; then # sh ran there to the end
      read -r status <"$WORK/$host.status"
      [ "$status" -ne 0 ] || continue
      failed="$failed; $host failed with exit status $status"
    elif [ "$status" -eq 255 ]; then
      failed="$failed; ssh to $host failed" status=3
    else
      failed="$failed; $host has not run it: its login shell ended with exit status $status" status=3
    fi
    failures=$((failures + 1))
    [ "$status" -le "$highest" ] || highest="$status"
  done
  wait # for the last lines
  say "$((${#SESSIONS[@]} - failures)) of ${#SESSIONS[@]} hosts succeeded$failed"
  return "$highest"
}

# Print every line of a host after its name; write the exit status to a file.
named() { # named <host> <file>
  local line
  while IFS= read -r line || [ -n "$line" ]; do
    case "$line" in
      *"$STATUS"*)
        printf '%s\n' "${line##*"$STATUS"}" >"$2"
        line="${line%%"$STATUS"*}" # of output without an end of line
        [ -n "$line" ] || continue
        ;;
    esac
    printf '%s: %s\n' "$1" "$line"
  done
}

interrupted() { # interrupted <exit status>
  trap '' INT TERM HUP
  kill "${SESSIONS[@]}" 2>/dev/null || true # some may have ended
  wait
  exit "$1"
}

main "$@"
