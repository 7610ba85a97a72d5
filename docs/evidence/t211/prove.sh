#!/usr/bin/env bash
# The whole promise, once, on a GPU host with a driver and nothing else: build the cell's image from this host's
# files, push it to a registry here, smoke it by digest on the GPU, sign what was seen, judge, publish to `verified`,
# pick it, verify it. Run as root in the repository's root with the pieces of the pack (pack.sh); what is to be
# kept comes as one archive:
#     docs/evidence/t211/prove.sh OUT/evidence.tar.gz PIECE...
# For a rehearsal without a GPU: TIER=cpu CELL=v73 TOP=/tmp/x DOCKER_HOST=unix:///… (an engine that runs).
set -euo pipefail
kept=$(realpath -m "$1")
shift
cell=${CELL:-t211} tier=${TIER:-gpu} top=${TOP:-/opt/mtbuild}
here=docs/evidence/t211 repo=$PWD out=$top/out
begin=$SECONDS
step() { echo "== $* (at $((SECONDS - begin)) s)"; }
rm -rf "$out" && mkdir -p "$top" "$out"
keep() { # whatever happened: what there is comes back
    local status=$?
    cp -r .mtbuild/keys/*.pub "$out/" 2>/dev/null || true
    cp .mtbuild/cells/*/*/{build,manifest,verdict}.json .mtbuild/cells/*/*/Dockerfile "$out/" 2>/dev/null || true
    cp "$top/stage/inventory.txt" "$out/" 2>/dev/null || true
    if [ -n "${ref:-}" ]; then # this run's folder alone, flat: the archive is laid out as it is kept
        local digest=${ref##*:}
        cp -r ".mtbuild/smoke/${digest:0:12}-$tier/." "$out/" 2>/dev/null || true
        mv "$out"/artefacts/* "$out/" 2>/dev/null && rmdir "$out/artefacts" || true
    fi
    step "ended with $status"
    sleep 0.5 # for tee
    sed -i "s|$top|TOP|g; s|$repo|.|g" "$out/run.log" "$out/commands.txt" 2>/dev/null || true
    tar -C "$out" -czf "$kept" .
    ls -l "$kept"
}
trap keep EXIT
exec > >(tee "$out/run.log") 2>&1

step unpack
cat "$@" | tar -C "$top" -x
for part in programs wheels; do tar -C "$top" -xJf "$top/$part.tar.xz"; done
mkdir -p "$top/ffmpeg" "$top/cache/engine" && tar -C "$top/ffmpeg" -xJf "$top/ffmpeg.tar.xz"
rm -rf "$top/cache/engine/programs" && mv "$top/programs" "$top/cache/engine/programs"
rm -rf "$top/site" "$top/own"
mkdir "$top/own"
for name in anyio attrs certifi cffi charset_normalizer click cryptography filelock h11 httpcore httpx idna jinja2 \
    markdown_it_py markupsafe mdurl packaging pycparser pygments pyyaml requests rich typing_extensions urllib3; do
    cp "$top"/image/$name-*.whl "$top/own/"
done
python3 -m pip install -q --no-index --no-deps --no-compile --target "$top/site" "$top"/host/*.whl "$top"/own/*.whl

if [ -z "${DOCKER_HOST:-}" ]; then
    step engine
    $here/host.sh "$top/engine.tar.xz"
    export DOCKER_HOST=unix:///run/docker.sock
fi
export MTBUILD_CACHE=$top/cache
mtbuild() {
    echo "\$ mtbuild $*" | sed "s|$top|TOP|g" >>"$out/commands.txt"
    PYTHONPATH=$repo/tools:$top/site python3 -c 'from mtbuild.cli import main; main()' "$@"
}

if [ ! -s "$top/ref" ]; then # a second run on the same host smokes the image that is there
    step stage
    rm -rf "$top/stage"
    id=$(PYTHONPATH=tools:$top/site python3 -c "import sys, pathlib, mtbuild.plan.matrix as m; \
print(m.load(pathlib.Path('matrix.yaml')).cell(sys.argv[1]).id)" "$cell")
    py=$(python3 -c "import json, sys; print(json.load(open(f'images/{sys.argv[1]}/cell.json'))['inputs']['python'])" "$id")
    also=() && [[ $id = *-xf* ]] && also=(--also xformers)
    python3 $here/stage.py "$top/stage" --python "$py" --wheels "$top/image" --programs "$top/ffmpeg" \
        --layers "${LAYERS:-12}" "${also[@]}"

    step build
    PYTHONPATH=tools:$top/site python3 $here/image.py "$cell" "$top/stage" >"$top/ref.new"
    mv "$top/ref.new" "$top/ref"
fi
ref=$(cat "$top/ref")

step "smoke $ref"
mtbuild smoke "$ref" --cell "$cell" --tier "$tier" --out "$out/evidence.json" --report "$out/report.json"

step publish
channel=verified wish=()
if [ "$tier" = gpu ]; then
    read -r gpu driver < <(python3 -c "import json, sys
facts = json.load(open(sys.argv[1]))['facts']
print(facts['gpu.name']['value'].replace(' ', '_'), facts['gpu.driver']['value'])" "$out/report.json")
    wish=(--gpu "${gpu//_/ }" --driver "$driver")
else
    channel=checked
fi
mtbuild publish "$ref" --cell "$cell" --evidence "$out/evidence.json" --channel $channel --json >"$out/promotion.json"
cat "$out/promotion.json"

step pick
mtbuild pick "${wish[@]}" --channel $channel
mtbuild pick "${wish[@]}" --channel $channel --json >"$out/pick.json"
name=$(python3 -c "import json, sys; print(json.load(open(sys.argv[1]))['name'])" "$out/promotion.json")

step verify
mtbuild verify "$name"
mtbuild catalog show --json >"$out/catalog.json"
