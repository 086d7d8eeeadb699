# Shared by the scripts at the top level, which source it: settings and messages. environment.sh installs Python packages.
# shellcheck shell=bash

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
SETTINGS="BASE_PORT HOSTS HOST_NAME MODERATOR_NUM MODERATOR_PER_HOST MODEL_PER_HOST AGENT_TYPE MAX_VALUE"
SETTINGS="$SETTINGS CLUSTER_KEY_DIR VLLM_BASE_PORT GPU_NUM TENSOR_PARALLEL MODEL_PATH REMOTE_DIR SSH_CONFIG"
SETTINGS="$SETTINGS EXTRA_PYTHONPATH PYTHON"
FLAGS=()

# Remove variables of the caller that may point Python to modules of other programs. PYTHON itself is a setting.
for name in ${!PYTHON@}; do [ "$name" = PYTHON ] || unset "$name"; done
export PYTHONUTF8=1 # file names, arguments and output are UTF-8, whatever the locale

# shellcheck source=scripts/environment.sh
. "$ROOT/scripts/environment.sh"

say() { printf '%s\n' "$*" >&2; }

fail() { # fail <exit status> <message>
  say "error: $2"
  exit "$1"
}

# nearest <name> <known name>...: print the most similar known name, or all of them if none is similar.
nearest() {
  # letters to change, add, leave out or swap with the next one; capitals, dashes and underscores make no difference
  awk 'function least(a, b) { return a < b ? a : b }
    function plain(name) { name = tolower(name); gsub(/[-_]/, "", name); return name }
    function changes(a, b,   i, j, d) {
      for (i = 0; i <= length(a); i++) d[i, 0] = i
      for (j = 0; j <= length(b); j++) d[0, j] = j
      for (i = 1; i <= length(a); i++) for (j = 1; j <= length(b); j++) {
        d[i, j] = least(least(d[i-1, j], d[i, j-1]) + 1, d[i-1, j-1] + (substr(a, i, 1) != substr(b, j, 1)))
        if (i > 1 && j > 1 && substr(a, i, 1) == substr(b, j-1, 1) && substr(a, i-1, 1) == substr(b, j, 1))
          d[i, j] = least(d[i, j], d[i-2, j-2] + 1)
      }
      return d[length(a), length(b)]
    }
    BEGIN {
      name = plain(ARGV[1]); fewest = length(name) / 3
      for (place = 2; place < ARGC; place++) {
        all = all (place > 2 ? ", " : "") ARGV[place]
        known = plain(ARGV[place]); number = changes(name, known)
        if (length(name) > 2 && index(known, name) == 1) number = (length(known) - length(name)) / 100 # a prefix
        if (number <= fewest) { fewest = number; meant = ARGV[place] }
      }
      print meant == "" ? "known are " all : "did you mean " meant "?"
    }' "$@"
}

refuse_unknown() { # refuse_unknown <first argument> <usage> <known first argument>...
  fail 2 "'$1' is not known here; $(nearest "$1" "${@:3}"); usage: $2"
}

# refuse_unknown, if a known one is similar; otherwise it may be a flag that came too early.
refuse_mistyped() { case "$(nearest "$1" "${@:3}")" in did*) refuse_unknown "$@" ;; esac; }

# The help of a script is the comment at its top.
show_help() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

is_setting() { case "$1" in '' | *[!A-Z_]*) false ;; *) case " $SETTINGS " in *" $1 "*) ;; *) false ;; esac ;; esac; }

# Read KEY=value lines of configs/cluster.env as defaults for settings that are not in the environment.
load_settings() {
  local file="$ROOT/configs/cluster.env" line key number=0 seen=" "
  HOSTS="${HOSTS:-}"
  HOSTS="${HOSTS//[[:space:]]/ }" # scontrol show hostnames prints one per line
  for key in CLUSTER_KEY_DIR MODEL_PATH EXTRA_PYTHONPATH REMOTE_DIR SSH_CONFIG PYTHON; do
    [ -z "${!key:-}" ] || printf -v "$key" '%s' "$(with_tilde "${!key}")"
  done
  [ -e "$file" ] || return 0
  { [ ! -d "$file" ] && [ -r "$file" ]; } || fail 2 "configs/cluster.env cannot be read: make it a file that you may read"
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    [ "$number" -gt 1 ] || line="${line#$'\xef\xbb\xbf'}" # the byte order mark of some editors
    line="${line#"${line%%[![:space:]]*}"}"
    line="${line%"${line##*[![:space:]]}"}"
    case "$line" in '' | '#'*) continue ;; esac
    key="${line%%=*}"
    # shellcheck disable=SC2086
    { [ "$key" != "$line" ] && is_setting "$key"; } ||
      fail 2 "configs/cluster.env, line $number: '$line' is no KEY=value of a setting; $(nearest "$key" $SETTINGS)"
    case "$seen" in *" $key "*) fail 2 "configs/cluster.env, line $number: $key is set above, too: keep one of them" ;; esac
    seen="$seen$key "
    case "$key" in # two names of one setting
      MODERATOR_*) [ -z "${MODERATOR_NUM:-}${MODERATOR_PER_HOST:-}" ] || continue ;;
    esac
    line="${line#*=}"
    case "$line" in
      \"*\" | \'*\') line="${line:1:${#line}-2}" ;;
      *' #'*) fail 2 "configs/cluster.env, line $number: '$line': write a comment on a line of its own" ;;
    esac
    line="$(with_tilde "$line")"
    case "$line" in *'$'*) fail 2 "configs/cluster.env, line $number: '$line': of variables, only \$HOME at the start is known" ;; esac
    case "$key" in # relative paths belong to the checkout
      CLUSTER_KEY_DIR | SSH_CONFIG) case "$line" in '' | /* | '~'*) ;; *) line="$ROOT/$line" ;; esac ;;
      EXTRA_PYTHONPATH) line="$(from_root "$line")" ;;
      MODEL_PATH) [ -z "$line" ] || [ ! -e "$ROOT/$line" ] || line="$ROOT/$line" ;; # otherwise the name of a model
    esac
    [ -n "${!key:-}" ] || printf -v "$key" '%s' "$line"
  done <"$file"
}

# from_root <path>[:<path>...]: print these paths; relative ones belong to the checkout.
from_root() {
  local part rest="$1:" paths=""
  while [ -n "$rest" ]; do
    part="${rest%%:*}"
    rest="${rest#*:}"
    case "$part" in '' | /* | '~'*) ;; *) part="$ROOT/$part" ;; esac
    paths="$paths:$part"
  done
  printf '%s' "${paths#:}"
}

# with_tilde <path>: print the path with ~ instead of $HOME at its start.
# shellcheck disable=SC2016
with_tilde() {
  case "$1" in
    '$HOME' | '$HOME/'*) printf '%s' "~${1#'$HOME'}" ;;
    '${HOME}' | '${HOME}/'*) printf '%s' "~${1#'${HOME}'}" ;;
    *) printf '%s' "$1" ;;
  esac
}

# expand_home <variable>: replace ~ or ~user at the start of its value, which no shell expands in a file.
expand_home() {
  local value="${!1:-}" name rest
  name="${value%%/*}"
  rest="${value#"$name"}"
  case "$name" in '~'*) ;; *) return 0 ;; esac
  case "$name" in *[!A-Za-z0-9._~-]*) return 0 ;; esac
  eval "name=$name"
  printf -v "$1" '%s' "$name$rest"
}

# flag <--name> <value>: add a flag to FLAGS, unless the value is empty.
flag() { [ -z "$2" ] || FLAGS+=("$1" "$2"); }

# Check that a script's first arguments are numbers, followed by flags. Python checks their range.
need_numbers() { # need_numbers <usage> <names of the numbers> [arguments]
  local usage="$1" name
  for name in $2; do
    case "${3:-}" in
      '') fail 2 "$name is missing; usage: $usage" ;;
      -[!0-9.]*) fail 2 "$name is missing: it comes before flags such as $3; usage: $usage" ;;
      *[!0-9]*) fail 2 "$name '$3': must be a whole number from 1, in digits such as 1000; usage: $usage" ;;
    esac
    set -- "$1" "$2" "${@:4}"
  done
  case "${3:--}" in -*) ;; *) fail 2 "'$3' is one argument too many; usage: $usage" ;; esac
}

# Add the flags from which Python finds the number of models on a host.
model_flags() {
  flag --model-per-host "${MODEL_PER_HOST:-}"
  flag --gpu-num "${GPU_NUM:-}"
  flag --tensor-parallel "${TENSOR_PARALLEL:-}"
  flag --vllm-base-port "${VLLM_BASE_PORT:-}"
}

# stop_servers <role of main.py> <folder in run/> <what messages call the servers> <usage> [arguments of the script]
stop_servers() {
  case "${5:-}" in
    '') ;;
    -h | --help) show_help && return ;;
    *) refuse_unknown "$5" "$4" --help ;;
  esac
  local run="${SIMULATION_HOME:-$ROOT}/run"
  if ! [ -e "$run/$2" ] && { ! [ -e "$run" ] || [ -x "$run" ]; }; then # otherwise Python reports the error
    echo "no $3 were running"
    return
  fi
  [ -x "$VENV/bin/python" ] || ensure_venv run # never reinstall while servers run
  exec "$VENV/bin/python" "$ROOT/main.py" --role "$1" --stop
}
