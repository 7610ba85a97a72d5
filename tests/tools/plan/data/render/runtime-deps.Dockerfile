# torch2.7.1-cu126-xf0.0.31-py311 (v73): rendered by `mtbuild render` from templates/. Change those, or matrix.yaml, not this file.
# BASE, and the build contexts `uv` and `runtime`, are passed by `mtbuild build`.
ARG BASE

# strip(1) for the layers below; nothing of this stage is in the image.
FROM ${BASE} AS binutils
RUN --mount=type=secret,id=apt.conf --mount=type=secret,id=apt.sources --mount=type=secret,id=apt.auth \
    --mount=type=secret,id=ca.pem \
    --mount=type=cache,id=mtbuild-apt-tools-lists,target=/var/lib/apt/lists,sharing=locked \
    --mount=type=cache,id=mtbuild-apt-tools,target=/var/cache/apt,sharing=locked <<'EOF'
set -eu
export DEBIAN_FRONTEND=noninteractive APT_CONFIG=/run/secrets/apt.conf
apt-get update -qq
apt-get install -y -qq --no-install-recommends -o DPkg::Options::=--force-unsafe-io \
    binutils
EOF

FROM ${BASE}

# Debian: the interpreter, ffmpeg, the user, an empty environment for the wheels.
RUN --mount=type=secret,id=apt.conf --mount=type=secret,id=apt.sources --mount=type=secret,id=apt.auth \
    --mount=type=secret,id=ca.pem \
    --mount=type=cache,id=mtbuild-apt-lists,target=/var/lib/apt/lists,sharing=locked \
    --mount=type=cache,id=mtbuild-apt,target=/var/cache/apt,sharing=locked \
    --mount=type=bind,from=uv,source=uv,target=/run/uv <<'EOF'
set -eu
: > /dev/shm/begin
export DEBIAN_FRONTEND=noninteractive APT_CONFIG=/run/secrets/apt.conf
apt-get update -qq
apt-get install -y -qq --no-install-recommends -o DPkg::Options::=--force-unsafe-io \
    -o DPkg::Options::=--path-exclude='/usr/lib/x86_64-linux-gnu/dri/*' \
    -o DPkg::Options::=--path-exclude='/usr/lib/x86_64-linux-gnu/libLLVM*' \
    -o DPkg::Options::=--path-exclude='/usr/lib/x86_64-linux-gnu/libmfxhw64*' \
    -o DPkg::Options::=--path-exclude='/usr/lib/x86_64-linux-gnu/libz3*' \
    -o DPkg::Options::=--path-exclude='/usr/lib/x86_64-linux-gnu/mfx/*' \
    -o DPkg::Options::=--path-exclude='/usr/share/X11/*' \
    -o DPkg::Options::=--path-exclude='/usr/share/icons/*' \
    -o DPkg::Options::=--path-exclude='/usr/share/sounds/*' \
    -o DPkg::Options::=--path-exclude='/usr/share/fonts/*' \
    ca-certificates ffmpeg python3
grep -q '^mt:' /etc/passwd || {
    echo 'mt:x:65532:65532:mtbuild:/tmp:/usr/sbin/nologin' >> /etc/passwd
    echo 'mt:x:65532:' >> /etc/group
}
mkdir -p /cache
chmod 1777 /cache
/run/uv venv --quiet --no-config --no-cache --python /usr/bin/python3 /opt/venv
PYTHONHASHSEED=0 python3 -m compileall -q -f --invalidation-mode unchecked-hash /usr/lib/python3.11 || :
ldconfig
rm -rf /var/log/* /var/lib/dpkg/*-old /var/cache/debconf/*-old /var/cache/ldconfig/aux-cache /etc/*-
find /cache /etc /opt /usr /var -xdev -cnewer /dev/shm/begin -newermt @1735689600 \
    ! -path /etc/hosts ! -path /etc/resolv.conf -exec touch --no-dereference --date=@1735689600 {} +
EOF

ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

# CUDA: cuDNN and cuBLAS
RUN --network=none --mount=type=bind,from=uv,source=uv,target=/run/uv \
    --mount=type=cache,id=mtbuild-wheels,target=/run/wheels,readonly <<'EOF'
set -eu
: > /dev/shm/begin
cat > /dev/shm/lock <<'LOCK'
nvidia-cudnn-cu12==9.5.1 --hash=sha256:2222222222222222222222222222222222222222222222222222222222222222
LOCK
mkdir /dev/shm/wheels
sed 's/.*sha256://' /dev/shm/lock | while read -r hash; do
    test -d "/run/wheels/$hash" || { echo "not in the build cache: $hash" >&2; exit 1; }
    ln -s "/run/wheels/$hash"/*.whl /dev/shm/wheels/
done
/run/uv pip install --quiet --no-cache --no-config --python /opt/venv/bin/python3 \
    --no-index --find-links /dev/shm/wheels --no-deps --require-hashes -r /dev/shm/lock
cd /opt/venv/lib/python3.11/site-packages
rm -rf \
    nvidia/*/include nvidia/*/src \
    nvidia/*/lib/*.a \
    nvidia/*/lib/cmake nvidia/*/lib/pkgconfig
find /opt/venv/lib/python3.11/site-packages -xdev -cnewer /dev/shm/begin -name '*.py' -print0 \
    | PYTHONHASHSEED=0 xargs -0 -r -n 300 -P "$(nproc)" \
        /opt/venv/bin/python3 -m compileall -q --invalidation-mode unchecked-hash || :
find /opt -xdev -cnewer /dev/shm/begin -newermt @1735689600 \
    ! -path /etc/hosts ! -path /etc/resolv.conf -exec touch --no-dereference --date=@1735689600 {} +
EOF

# torch
RUN --network=none --mount=type=bind,from=uv,source=uv,target=/run/uv \
    --mount=type=cache,id=mtbuild-wheels,target=/run/wheels,readonly \
    --mount=type=bind,from=binutils,target=/run/binutils <<'EOF'
set -eu
: > /dev/shm/begin
cat > /dev/shm/lock <<'LOCK'
torch==2.7.1 --hash=sha256:3333333333333333333333333333333333333333333333333333333333333333
LOCK
mkdir /dev/shm/wheels
sed 's/.*sha256://' /dev/shm/lock | while read -r hash; do
    test -d "/run/wheels/$hash" || { echo "not in the build cache: $hash" >&2; exit 1; }
    ln -s "/run/wheels/$hash"/*.whl /dev/shm/wheels/
done
/run/uv pip install --quiet --no-cache --no-config --python /opt/venv/bin/python3 \
    --no-index --find-links /dev/shm/wheels --no-deps --require-hashes -r /dev/shm/lock
cd /opt/venv/lib/python3.11/site-packages
rm -rf \
    torch/bin/protoc* \
    torch/bin/*_test torch/bin/test_* \
    torch/lib/lib*_test.so torch/lib/libbackend_with_compiler.so \
    torch/lib/*.a
for file in torch/lib/libtorch_*.so torch/lib/libc10*.so torch/lib/libtorch.so; do
    test ! -f "$file" || LD_LIBRARY_PATH=/run/binutils/usr/lib/x86_64-linux-gnu \
        /run/binutils/usr/bin/strip --strip-unneeded "$file"
done
find /opt/venv/lib/python3.11/site-packages -xdev -cnewer /dev/shm/begin -name '*.py' -print0 \
    | PYTHONHASHSEED=0 xargs -0 -r -n 300 -P "$(nproc)" \
        /opt/venv/bin/python3 -m compileall -q --invalidation-mode unchecked-hash || :
find /opt -xdev -cnewer /dev/shm/begin -newermt @1735689600 \
    ! -path /etc/hosts ! -path /etc/resolv.conf -exec touch --no-dereference --date=@1735689600 {} +
EOF

# triton
RUN --network=none --mount=type=bind,from=uv,source=uv,target=/run/uv \
    --mount=type=cache,id=mtbuild-wheels,target=/run/wheels,readonly \
    --mount=type=bind,from=binutils,target=/run/binutils <<'EOF'
set -eu
: > /dev/shm/begin
cat > /dev/shm/lock <<'LOCK'
triton==3.3.1 --hash=sha256:4444444444444444444444444444444444444444444444444444444444444444
LOCK
mkdir /dev/shm/wheels
sed 's/.*sha256://' /dev/shm/lock | while read -r hash; do
    test -d "/run/wheels/$hash" || { echo "not in the build cache: $hash" >&2; exit 1; }
    ln -s "/run/wheels/$hash"/*.whl /dev/shm/wheels/
done
/run/uv pip install --quiet --no-cache --no-config --python /opt/venv/bin/python3 \
    --no-index --find-links /dev/shm/wheels --no-deps --require-hashes -r /dev/shm/lock
cd /opt/venv/lib/python3.11/site-packages
rm -rf \
    triton/_C/libproton.so triton/profiler triton/instrumentation ../../../bin/proton* \
    triton/backends/nvidia/lib/cupti \
    triton/backends/nvidia/bin/cuobjdump triton/backends/nvidia/bin/nvdisasm \
    triton/backends/nvidia/lib/*.a \
    triton/_C/libtriton_amd_codegen.so
for file in triton/_C/libtriton.so; do
    test ! -f "$file" || LD_LIBRARY_PATH=/run/binutils/usr/lib/x86_64-linux-gnu \
        /run/binutils/usr/bin/strip --strip-unneeded "$file"
done
find /opt/venv/lib/python3.11/site-packages -xdev -cnewer /dev/shm/begin -name '*.py' -print0 \
    | PYTHONHASHSEED=0 xargs -0 -r -n 300 -P "$(nproc)" \
        /opt/venv/bin/python3 -m compileall -q --invalidation-mode unchecked-hash || :
find /opt -xdev -cnewer /dev/shm/begin -newermt @1735689600 \
    ! -path /etc/hosts ! -path /etc/resolv.conf -exec touch --no-dereference --date=@1735689600 {} +
EOF

# Triton builds a C stub for each GPU it meets: compiler, C library and Python headers.
RUN --mount=type=secret,id=apt.conf --mount=type=secret,id=apt.sources --mount=type=secret,id=apt.auth \
    --mount=type=secret,id=ca.pem \
    --mount=type=cache,id=mtbuild-apt-lists,target=/var/lib/apt/lists,sharing=locked \
    --mount=type=cache,id=mtbuild-apt,target=/var/cache/apt,sharing=locked <<'EOF'
set -eu
: > /dev/shm/begin
export DEBIAN_FRONTEND=noninteractive APT_CONFIG=/run/secrets/apt.conf
apt-get update -qq
apt-get install -y -qq --no-install-recommends -o DPkg::Options::=--force-unsafe-io \
    -o DPkg::Options::=--path-exclude='/usr/bin/*lto-dump*' \
    -o DPkg::Options::=--path-exclude='/usr/lib/gcc/x86_64-linux-gnu/*/lto1' \
    -o DPkg::Options::=--path-exclude='/usr/lib/gcc/x86_64-linux-gnu/*/lib*san*' \
    -o DPkg::Options::=--path-exclude='/usr/lib/x86_64-linux-gnu/lib*san.so*' \
    -o DPkg::Options::=--path-exclude='/usr/lib/python3*/config-*/*.a' \
    -o DPkg::Options::=--path-exclude='/usr/lib/x86_64-linux-gnu/libpython3*.a' \
    g++ gcc libc6-dev libpython3-dev
ldconfig
rm -rf /var/log/* /var/lib/dpkg/*-old /var/cache/debconf/*-old /var/cache/ldconfig/aux-cache /etc/*-
find /etc /usr /var -xdev -cnewer /dev/shm/begin -newermt @1735689600 \
    ! -path /etc/hosts ! -path /etc/resolv.conf -exec touch --no-dereference --date=@1735689600 {} +
EOF

# xformers
RUN --network=none --mount=type=bind,from=uv,source=uv,target=/run/uv \
    --mount=type=cache,id=mtbuild-wheels,target=/run/wheels,readonly \
    --mount=type=bind,from=binutils,target=/run/binutils <<'EOF'
set -eu
: > /dev/shm/begin
cat > /dev/shm/lock <<'LOCK'
xformers==0.0.31 --hash=sha256:5555555555555555555555555555555555555555555555555555555555555555
LOCK
mkdir /dev/shm/wheels
sed 's/.*sha256://' /dev/shm/lock | while read -r hash; do
    test -d "/run/wheels/$hash" || { echo "not in the build cache: $hash" >&2; exit 1; }
    ln -s "/run/wheels/$hash"/*.whl /dev/shm/wheels/
done
/run/uv pip install --quiet --no-cache --no-config --python /opt/venv/bin/python3 \
    --no-index --find-links /dev/shm/wheels --no-deps --require-hashes -r /dev/shm/lock
cd /opt/venv/lib/python3.11/site-packages
for file in xformers/*.so xformers/flash_attn_3/*.so; do
    test ! -f "$file" || LD_LIBRARY_PATH=/run/binutils/usr/lib/x86_64-linux-gnu \
        /run/binutils/usr/bin/strip --strip-unneeded "$file"
done
find /opt/venv/lib/python3.11/site-packages -xdev -cnewer /dev/shm/begin -name '*.py' -print0 \
    | PYTHONHASHSEED=0 xargs -0 -r -n 300 -P "$(nproc)" \
        /opt/venv/bin/python3 -m compileall -q --invalidation-mode unchecked-hash || :
find /opt -xdev -cnewer /dev/shm/begin -newermt @1735689600 \
    ! -path /etc/hosts ! -path /etc/resolv.conf -exec touch --no-dereference --date=@1735689600 {} +
EOF

# what the runtime needs
RUN --network=none --mount=type=bind,from=uv,source=uv,target=/run/uv \
    --mount=type=cache,id=mtbuild-wheels,target=/run/wheels,readonly <<'EOF'
set -eu
: > /dev/shm/begin
cat > /dev/shm/lock <<'LOCK'
numpy==1.26.4 --hash=sha256:1111111111111111111111111111111111111111111111111111111111111111
LOCK
mkdir /dev/shm/wheels
sed 's/.*sha256://' /dev/shm/lock | while read -r hash; do
    test -d "/run/wheels/$hash" || { echo "not in the build cache: $hash" >&2; exit 1; }
    ln -s "/run/wheels/$hash"/*.whl /dev/shm/wheels/
done
/run/uv pip install --quiet --no-cache --no-config --python /opt/venv/bin/python3 \
    --no-index --find-links /dev/shm/wheels --no-deps --require-hashes -r /dev/shm/lock
cd /opt/venv/lib/python3.11/site-packages
rm -rf \
    numpy/tests numpy/*/tests numpy/*/*/tests
find /opt/venv/lib/python3.11/site-packages -xdev -cnewer /dev/shm/begin -name '*.py' -print0 \
    | PYTHONHASHSEED=0 xargs -0 -r -n 300 -P "$(nproc)" \
        /opt/venv/bin/python3 -m compileall -q --invalidation-mode unchecked-hash || :
find /opt -xdev -cnewer /dev/shm/begin -newermt @1735689600 \
    ! -path /etc/hosts ! -path /etc/resolv.conf -exec touch --no-dereference --date=@1735689600 {} +
EOF

# The runtime, built from this tree.
RUN --network=none --mount=type=bind,from=uv,source=uv,target=/run/uv \
    --mount=type=bind,from=runtime,target=/run/runtime <<'EOF'
set -eu
: > /dev/shm/begin
/run/uv pip install --quiet --no-cache --no-config --python /opt/venv/bin/python3 \
    --no-index --no-deps /run/runtime/*.whl
find /opt/venv/lib/python3.11/site-packages -xdev -cnewer /dev/shm/begin -name '*.py' -print0 \
    | PYTHONHASHSEED=0 xargs -0 -r -n 300 -P "$(nproc)" \
        /opt/venv/bin/python3 -m compileall -q --invalidation-mode unchecked-hash || :
find /opt -xdev -cnewer /dev/shm/begin -newermt @1735689600 \
    ! -path /etc/hosts ! -path /etc/resolv.conf -exec touch --no-dereference --date=@1735689600 {} +
EOF

ENV CC=gcc CXX=g++
# Every cache that a run may write lies in /cache; HOME and USER are for uids without an entry in passwd.
ENV HOME=/tmp \
    USER=mt \
    LOGNAME=mt \
    CUDA_CACHE_PATH=/cache/cuda \
    HF_HOME=/cache/huggingface \
    MPLCONFIGDIR=/cache/matplotlib \
    NUMBA_CACHE_DIR=/cache/numba \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TORCH_HOME=/cache/torch \
    TRITON_CACHE_DIR=/cache/triton \
    TRITON_HOME=/cache \
    XDG_CACHE_HOME=/cache/xdg
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_REQUIRE_CUDA="cuda>=12.6 driver>=525.60.13"

LABEL org.opencontainers.image.title="multitalk v73" \
      org.opencontainers.image.description="MultiTalk on Wan2.1: torch 2.7.1, CUDA 12.6, triton 3.3.1, xformers 0.0.31, Python 3.11" \
      org.opencontainers.image.version="torch2.7.1-cu126-xf0.0.31-py311" \
      mtbuild.cell="torch2.7.1-cu126-xf0.0.31-py311" \
      mtbuild.name="v73" \
      mtbuild.suite="bookworm" \
      mtbuild.flavour="runtime-deps"

USER 65532:65532
# Further programs: serve, generate_multitalk, mtmodels (`docker run … IMAGE mtmodels plan DIR`).
CMD ["python3", "-u", "-m", "multitalk_runtime.handler"]

