# shellcheck shell=sh
# Run on a host by ./on_all_hosts.sh push-key, as: <folder of the key> [--force], with the certificate, an empty line and
# the key on the input.
# The umask and a draft beside the folder keep the key unreadable for others at all times.
umask 077
force="${2:-}"
mkdir -p -- "$(dirname -- "$1")" || exit 2
draft="$(mktemp -d "$1.XXXXXX")" || exit 2
trap 'rm -rf -- "$draft"' EXIT
trap 'exit 2' HUP INT TERM
(cd -- "$draft" && awk '/^$/ { key = 1; next } { print > (key ? "cluster.key" : "cluster.crt") }') || exit 2
printf '*\n' >"$draft/.gitignore" || exit 2 # in a checkout, git must not take the key
[ -s "$draft/cluster.crt" ] && [ -s "$draft/cluster.key" ] || exit 2
same() { cmp -s -- "$draft/$2" "$1/$2"; }
if [ -e "$1/cluster.crt" ] || [ -e "$1/cluster.key" ]; then
  if same "$1" cluster.crt && same "$1" cluster.key; then
    message='has the cluster key already'
  elif [ "$force" = --force ]; then
    message='has the cluster key now, in place of another'
  else
    echo "error: $1 in $PWD holds another cluster key: stop what uses it, and replace it with push-key --force" >&2
    exit 2
  fi
else
  message='has the cluster key now'
fi
mkdir -p -- "$1" && chmod 700 "$1" && chmod 600 "$draft/cluster.key" "$draft/cluster.crt" &&
  mv -f -- "$draft/cluster.key" "$draft/cluster.crt" "$draft/.gitignore" "$1/" || exit 2
echo "$message"
