# Sourced by the scripts where tests let them (BASH_ENV): the start of main.py that a script ends in is written down, and
# does not happen.
# shellcheck shell=bash
exec() {
  case "${2:-}" in
    */main.py) printf '%s\0' "$@" >"$RECORDED_EXEC" && exit 0 ;;
    *) builtin exec "$@" ;;
  esac
}
