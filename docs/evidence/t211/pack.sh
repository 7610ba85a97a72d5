#!/usr/bin/env bash
# On a machine with the embedded engine's programs (`mtbuild engine start`) and a package index: pack what a GPU
# host without a network needs, into carry/ (ignored by git). Three packs, so that each is small enough to send.
#   engine.tar.xz   dockerd, containerd, its shim, runc, init, and the shared libraries that these link
#   tools.tar.xz    docker client, buildx, registry; wheels for mtbuild (host/)
#   wheels.tar.xz   wheels for the image (image/): the runtime and what it needs
set -euo pipefail
cd "$(dirname "$0")/../../.."
programs=${MTBUILD_CACHE:-$HOME/.cache/mtbuild}/engine/programs
python=${PYTHON:-.venv/bin/python}
rm -rf carry/pack && mkdir -p carry/pack/engine/{bin,lib} carry/pack/tools/{bin,host} carry/pack/wheels/image

engine=carry/pack/engine
install -s -t $engine/bin "$programs"/usr/{sbin/dockerd,bin/containerd,bin/containerd-shim-runc-v2,sbin/runc}
install -s "$programs/usr/bin/tini-static" $engine/bin/docker-init
# A GPU host's own libraries come first; these are for what it lacks.
ldd $engine/bin/dockerd $engine/bin/runc | awk '/=> \// {print $3}' | grep -Ev 'lib(c|m|dl|pthread|rt)\.so' |
    sort -u | xargs cp -L -t $engine/lib

tools=carry/pack/tools
install -s -t $tools/bin "$programs"/usr/{bin/docker,bin/docker-registry,libexec/docker/cli-plugins/docker-buildx}
wheels=carry/pack/wheels
target=(--python-version 3.12 --implementation cp --only-binary=:all: --no-deps --quiet
    --platform manylinux_2_34_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64
    --platform manylinux2014_x86_64)
# mtbuild's dependencies that such a host does not have (its torch environment has click, httpx, jinja2, …)
$python -m pip download "${target[@]}" -d $tools/host \
    docker cryptography cffi pycparser jsonschema jsonschema-specifications referencing rpds-py platformdirs \
    pyelftools bracex pypi-simple mailbits beautifulsoup4 soupsieve
# for the image: what `wan` needs beside torch and triton, which are the host's
# (Triton 3.6's interpreter does not work with numpy 2.5, which such a host may have)
$python -m pip download "${target[@]}" -d $wheels/image \
    'numpy<2' 'scipy<1.17' ftfy wcwidth soundfile pyloudnorm cffi pycparser
mkdir carry/pack/tree && git archive HEAD | tar -C carry/pack/tree -x # what is committed, nothing half-done
.venv/bin/uv build --quiet --wheel --out-dir $wheels/image carry/pack/tree
rm -f $wheels/image/.gitignore
for pack in ${PACKS:-engine tools wheels}; do
    tar -C carry/pack/$pack -c . | xz -T0 -6 >carry/$pack.tar.xz
done
rm -rf carry/pack
ls -l carry
