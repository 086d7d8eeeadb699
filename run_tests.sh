#!/usr/bin/env bash
# Check everything: ruff, mypy, ShellCheck, and pytest against real agent servers.
#
#   ./run_tests.sh [--fast] [pytest arguments]
#
# --fast leaves out the tests that install anew or run long, those with a real vLLM server among them. Without it, root
# of a Debian also gets the packages that tests with several hosts need.
set -euo pipefail

# shellcheck source=scripts/lib.sh
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/lib.sh"

# The program's own files: a checkout may also hold files of whoever works in it, which are nobody else's business
CODE=(main.py moderator.py participant.py simulation tests benchmarks examples)
SCRIPTS=(run_simulation.sh start_all_server.sh stop_all_server.sh start_vllm.sh stop_vllm.sh on_all_hosts.sh run_tests.sh
  scripts/lib.sh scripts/receive_key.sh examples/slurm/simulation.sbatch examples/slurm/node.sh .ci/run)

main() {
  local selection=()
  case "${1:-}" in
    -h | --help) show_help && return ;;
    --fast) selection=(-m "not slow") && shift ;;
  esac
  ensure_venv test
  if [ "${#selection[@]}" -eq 0 ]; then # a machine that cannot hold vLLM skips its tests, and says so
    ensure_debian
    "$ROOT/start_vllm.sh" --install || say "tests that need vLLM will be skipped"
  fi
  cd "$ROOT"
  "$VENV/bin/ruff" check "${CODE[@]}"
  "$VENV/bin/ruff" format --check --diff "${CODE[@]}"
  "$VENV/bin/shellcheck" -x "${SCRIPTS[@]}"
  local folder
  folder="$(mktemp -d)"
  # where a file such as random.py in the checkout does not stand for Python's own module
  ln -s "$ROOT/simulation" "$folder/"
  (cd "$folder" && "$VENV/bin/python" -P -m mypy --config-file "$ROOT/pyproject.toml" --cache-dir "$ROOT/.mypy_cache")
  # two files at a time: most tests wait for processes to start, or for participants to think; in a folder of their own,
  # as pytest's shared one may hold what it cannot remove (a disk that a killed run left mounted), and breaks off then
  # a test may take many times as long on a busy machine: the limit is for those that hang
  "$VENV/bin/python" -P -m pytest -n 2 --dist loadfile --timeout 900 --basetemp "$folder/tests" \
    ${selection[@]+"${selection[@]}"} "$@" || { status=$? && say "the tests' files stay in $folder" && exit "$status"; }
  rm -rf "$folder"
}

main "$@"
