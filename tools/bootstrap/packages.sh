#!/bin/sh
# Install Debian packages for programs that are missing:  packages.sh PROGRAM=PACKAGE …
# Does nothing where all of them are there, so that it needs root only where something has to be installed.
set -eu
missing=
for pair in "$@"; do
    command -v "${pair%%=*}" >/dev/null 2>&1 || missing="$missing ${pair#*=}"
done
[ -n "$missing" ] || exit 0
if ! command -v apt-get >/dev/null; then
    printf 'setup: error: missing on this machine:%s\n  fix: install them in your system'\''s own way\n' "$missing" >&2
    exit 3
fi
if [ "$(id -u)" != 0 ]; then
    printf 'setup: error: missing, and only root can install them:%s\n  fix: sudo apt-get install%s\n' \
        "$missing" "$missing" >&2
    exit 3
fi
printf 'setup: installing%s …\n' "$missing" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086 # one word a package
apt-get install -qq -y --no-install-recommends --no-remove -o DPkg::Lock::Timeout=600 $missing >/dev/null
