# torch2.7.1-cu126-xf0.0.31-py311-minimal (v73): rendered by `mtbuild render` from templates/. Change those, or matrix.yaml, not this file.
# BASE, and the build contexts `uv` and `runtime`, are passed by `mtbuild build`.
ARG BASE
FROM ${BASE}

USER 0
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
grep -q '^mt:' /etc/passwd || {
    echo 'mt:x:65532:65532:mtbuild:/tmp:/usr/sbin/nologin' >> /etc/passwd
    echo 'mt:x:65532:' >> /etc/group
}
mkdir -p /cache
chmod 1777 /cache
ldconfig
rm -rf /var/log/* /var/lib/dpkg/*-old /var/cache/debconf/*-old /var/cache/ldconfig/aux-cache /etc/*-
find /cache /etc /usr /var -xdev -cnewer /dev/shm/begin -newermt @1735689600 \
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
      org.opencontainers.image.version="torch2.7.1-cu126-xf0.0.31-py311-minimal" \
      mtbuild.cell="torch2.7.1-cu126-xf0.0.31-py311-minimal" \
      mtbuild.name="v73" \
      mtbuild.suite="bookworm" \
      mtbuild.flavour="minimal"

USER 65532:65532

