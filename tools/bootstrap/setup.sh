#!/bin/sh
# Everything that `make matrix` and `make test` need before mtbuild itself can run: Python with its
# headers, a C compiler, a virtual environment, uv, PyTorch, and both distributions of this project.
# Safe to run again; what is there already is left alone. Indexes and mirrors are the machine's own.
set -eu
cd "$(dirname "$0")/../.."
venv=${VENV:-.venv}
torch=2.13.0

say() { printf '%s\n' "setup: $*" >&2; }

# A Python that pyproject.toml allows, complete enough to make an environment and build an extension.
usable() {
    "$1" - >/dev/null 2>&1 <<'PY'
import ensurepip, pathlib, sys, sysconfig, venv
assert (3, 11) <= sys.version_info < (3, 13)
assert pathlib.Path(sysconfig.get_path("include"), "Python.h").is_file()
PY
}

find_python() {
    for candidate in ${PYTHON:-} python3.11 python3.12 python3 /usr/bin/python3; do
        path=$(command -v "$candidate" 2>/dev/null) || continue
        if usable "$path"; then
            printf '%s\n' "$path"
            return
        fi
    done
    return 1
}

tools/bootstrap/packages.sh gcc=gcc gcc=libc6-dev git=git ffmpeg=ffmpeg ffprobe=ffmpeg
if ! [ -x "$venv/bin/python" ]; then
    if ! python=$(find_python); then
        # A program that no machine has stands for "install these".
        tools/bootstrap/packages.sh no-complete-python3=python3 no-complete-python3=python3-venv \
            no-complete-python3=python3-dev
        python=$(find_python) || {
            say "error: python3 of this system is not 3.11 or 3.12"
            say "  fix: install one of them with venv and headers, then: make setup PYTHON=/path/to/python3.11"
            exit 3
        }
    fi
    say "making $venv with $python …"
    "$python" -m venv "$venv"
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; } # errors only

# By pip and first: pip also knows the machine's find-links and extra indexes, where a CPU build of PyTorch
# may lie. uv then finds the version that is asked for installed and leaves it alone.
say "uv and torch $torch (the longest step on a new machine) …"
pip install uv "torch==$torch"

# uv has settings of its own. Where there are none, it gets pip's index, so that one configuration is enough.
if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
    index=${PIP_INDEX_URL:-$(pip config get global.index-url 2>/dev/null || true)}
    if [ -n "$index" ]; then export UV_DEFAULT_INDEX="$index"; fi
fi
if [ -z "${SSL_CERT_FILE:-}" ]; then
    bundle=${PIP_CERT:-$(pip config get global.cert 2>/dev/null || true)}
    if [ -n "$bundle" ]; then export SSL_CERT_FILE="$bundle"; fi
fi

say "mtbuild, the runtime and the test tools …"
"$venv/bin/uv" pip install --quiet --python "$venv" -e . -e tools \
    --group test --group tools/pyproject.toml:dev
"$venv/bin/mtbuild" --version >&2
