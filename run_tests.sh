#!/usr/bin/env bash
# Check the program: ruff, mypy, ShellCheck, and pytest against real agent servers.
#
#   ./run_tests.sh [--fast | --all] [pytest arguments]
#
# Without a flag it checks all that a change needs, in at most ten minutes on two cores. --all adds what takes long:
# real vLLM, new installations, a million participants, the commands of README, and further cases of what is tested without it.
# --fast checks in three minutes that the program works on this machine.
# Without --fast, root of a Debian also gets the packages that tests with several hosts and with pages need.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by another shell, as in: sh run_tests.sh
! (return 0 2>/dev/null) || { echo "error: run_tests.sh is to be started, not sourced" >&2 && return 2; }
set -euo pipefail +o posix

# shellcheck source=scripts/lib.sh
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/lib.sh"

# The program's own files: a checkout may also hold files of the researcher who works in it, in examples/ for instance
CODE=(main.py moderator.py participant.py games scripts simulation tests
  examples/level_k.py examples/mlflow_hook.py examples/python.ipynb examples/read_answers.py
  benchmarks/call_counter/sitecustomize.py benchmarks/commands.py benchmarks/common.py benchmarks/dashboard.py benchmarks/faults.py
  benchmarks/llm.py benchmarks/own_participants.py benchmarks/rounds.py benchmarks/scale.py benchmarks/scale_network.py)
SCRIPTS=(run_simulation.sh start_all_server.sh stop_all_server.sh start_vllm.sh stop_vllm.sh on_all_hosts.sh run_tests.sh
  scripts/lib.sh scripts/environment.sh scripts/receive_key.sh tests/record_exec.sh examples/slurm/simulation.sbatch examples/slurm/node.sh
  .ci/run)
# The rules, games on servers that stay up, participants of one's own, language models (a stand-in answers), scripts
FAST=(tests/test_game.py tests/test_answer_parser.py tests/test_group.py tests/test_cluster.py tests/test_failure_detector.py tests/test_level_k.py
  tests/test_participants.py tests/test_models.py tests/test_security.py)
WORKERS=4 # tests at a time: most wait for processes to start, or for participants to think

USAGE="./run_tests.sh [--fast | --all] [pytest arguments]"

main() {
  local tests=() selection="not slow" folder status=0 argument name
  local left_out="real vLLM, new installations, a million participants and more; ./run_tests.sh --all runs them"
  for argument in "$@"; do # before anything is installed: pytest, which gets the others, is asked last
    case "$argument" in
      --fast | --all) [ "$argument" = "$1" ] || fail 2 "$argument comes first; usage: $USAGE" ;;
      --*) refuse_mistyped "$argument" "$USAGE" --fast --all ;;
    esac
  done
  case "${1:-}" in
    -h | --help) show_help && return ;;
    --fast)
      tests=("${FAST[@]/#/$ROOT/}") && shift
      left_out="linters, faults, several hosts, pages and more; ./run_tests.sh runs them"
      ;;
    --all) selection="slow or not slow" left_out="" && shift ;;
  esac
  ensure_venv test
  for name in $SETTINGS; do [ "$name" = PYTHON ] || unset "$name"; done # of the user who runs the tests
  cd "$ROOT"
  if [ "${#tests[@]}" -eq 0 ]; then
    ensure_debian
    [ -n "$left_out" ] || "$ROOT/start_vllm.sh" --install || say "tests that need vLLM will be skipped"
    lint
  fi
  # not pytest's shared folder, which may contain a disk that a killed run left mounted
  folder="$(mktemp -d)"
  "$VENV/bin/python" -P -m pytest -c "$ROOT/pyproject.toml" --rootdir "$ROOT" --confcutdir "$ROOT/tests" -n "$WORKERS" --dist load --basetemp "$folder/tests" \
    -m "$selection" ${tests[@]+"${tests[@]}"} "$@" || status=$?
  [ "$status" -eq 0 ] || fail "$status" "not all of that works here; the tests' files stay in $folder"
  rm -rf "$folder"
  [ -z "$left_out" ] || say "all of that works here; left out: $left_out"
}

# Install the Debian packages that some tests need, if possible, without starting their services.
ensure_debian() {
  local missing=() log="$ROOT/run/install.log"
  command -v ip >/dev/null || missing+=(iproute2)
  [ -x /usr/sbin/sshd ] || missing+=(openssh-server)
  command -v chromium >/dev/null || missing+=(chromium)
  [ "${#missing[@]}" -gt 0 ] || return 0
  if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    say "installing ${missing[*]} for the tests"
    mkdir -p "$ROOT/run"
    ! apt_install "${missing[@]}" </dev/null >"$log" 2>&1 || return 0
    say "cannot install: $(grep '^E:' "$log" | tail -n 1 || true); see $log"
  fi
  say "tests that need these packages of Debian will be skipped: ${missing[*]}"
}

apt_install() (
  policy=/usr/sbin/policy-rc.d # decides whether packages start their services
  if ! [ -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" || return 1
  fi
  apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@" || return 1
  case "$*" in *ssh*) ! command -v systemctl || systemctl disable ssh.service ssh.socket || true ;; esac
)

lint() {
  local folder name
  "$VENV/bin/ruff" check --config "$ROOT/pyproject.toml" "${CODE[@]}"
  "$VENV/bin/ruff" format --config "$ROOT/pyproject.toml" --check --diff "${CODE[@]}"
  "$VENV/bin/shellcheck" --norc -x "${SCRIPTS[@]}"
  folder="$(mktemp -d)" # where a file such as random.py in the checkout does not stand for Python's own module
  for name in main.py moderator.py participant.py games simulation; do ln -s "$ROOT/$name" "$folder/"; done
  (cd "$folder" && "$VENV/bin/python" -P -m mypy --config-file "$ROOT/pyproject.toml" --cache-dir "$ROOT/.mypy_cache")
  rm -rf "$folder"
}

main "$@"
