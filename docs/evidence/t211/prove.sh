#!/usr/bin/env bash
# On the GPU host, after host.sh: build the image of cell t211 from this host's files, push it to a registry on
# loopback, and smoke it by digest with mtbuild on the GPU tier. Run in the repository's root; results go to $1.
set -euo pipefail
out=$1
top=/opt/mtbuild
repo=$PWD
mkdir -p $top/tools "$HOME/.docker/cli-plugins" && tar -C $top/tools -xJf carry/tools.tar.xz
tar -C $top/tools -xJf carry/wheels.tar.xz
export PATH=$top/tools/bin:$PATH DOCKER_HOST=unix:///run/docker.sock
ln -sf $top/tools/bin/docker-buildx "$HOME/.docker/cli-plugins/docker-buildx"
rm -rf $top/site
python3 -m pip install -q --no-index --no-deps --no-compile --target $top/site $top/tools/host/*.whl

echo "== stage"
rm -rf $top/stage
time python3 docs/evidence/t211/stage.py $top/stage --python 3.12 --wheels $top/tools/image

echo "== registry"
mkdir -p $top/registry
printf 'version: 0.1\nstorage: {filesystem: {rootdirectory: %s/registry}, delete: {enabled: true}}\nhttp: {addr: "127.0.0.1:5100"}\n' \
    $top >$top/registry.yml
[ -e $top/registry.log ] || setsid docker-registry serve $top/registry.yml >$top/registry.log 2>&1 </dev/null &

echo "== build"
contexts=(--build-context "root=$top/stage/root")
for i in $(seq 0 11); do contexts+=(--build-context "layer$i=$top/stage/layer$i"); done
mkdir -p $top/empty
time docker buildx build --progress=plain --provenance=false --sbom=false "${contexts[@]}" \
    --file docs/evidence/t211/Dockerfile --metadata-file $top/build.json \
    --output type=image,name=127.0.0.1:5100/staging:t211,push=true,oci-mediatypes=true,compression=zstd,compression-level=1,force-compression=true \
    $top/empty 2>&1 | grep -Ev 'transferring|sha256:|CACHED' | tail -40
digest=$(python3 -c "import json; print(json.load(open('$top/build.json'))['containerimage.digest'])")
ref=127.0.0.1:5100/staging@$digest
echo "== smoke $ref"
export PYTHONPATH=$repo/tools:$top/site MTBUILD_CACHE=$top/cache
mtbuild() { python3 -c 'from mtbuild.cli import main; main()' "$@"; }
status=0
time mtbuild smoke "$ref" --cell t211 --tier gpu --out "$out/evidence.json" --report "$out/report.json" || status=$?
cp .mtbuild/keys/mtbuild.pub "$out/" || true
echo "== smoke ended with $status"
docker ps -a
exit $status
