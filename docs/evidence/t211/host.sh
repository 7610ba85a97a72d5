#!/usr/bin/env bash
# On the GPU host: start an engine from the pack. Nothing of the host is changed but /etc/cdi and /opt/mtbuild.
# The engine gets no network of its own (no bridge, no iptables): what is built here copies files of this host.
set -euo pipefail
top=/opt/mtbuild
mkdir -p $top && tar -C $top -xJf "$1"
export PATH=$top/bin:$PATH

# The driver as CDI devices, one a card and one for all: the nodes, and the driver's user-space folder where
# the libraries are looked for.
driver=${DRIVER:-/usr/local/nvidia}
mkdir -p /etc/cdi
python3 - "$driver" >/etc/cdi/nvidia.json <<'PY'
import json, sys
from pathlib import Path
driver = sys.argv[1]
control = [str(p) for n in ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools") if (p := Path("/dev", n)).exists()]
cards = sorted(Path("/dev").glob("nvidia[0-9]*"), key=lambda p: int(p.name[6:]))
def device(name, nodes):
    return {"name": name, "containerEdits": {"deviceNodes": [{"path": n} for n in nodes]}}
devices = [device(card.name[6:], [str(card)]) for card in cards] + [device("all", map(str, cards))]
edits = {"deviceNodes": [{"path": n} for n in control], "env": [f"LD_LIBRARY_PATH={driver}/lib64"],
         "mounts": [{"hostPath": driver, "containerPath": driver, "options": ["ro", "rbind", "rprivate"]}]}
print(json.dumps({"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": devices, "containerEdits": edits}))
PY

cat >$top/daemon.json <<JSON
{"features": {"containerd-snapshotter": true, "cdi": true}, "cdi-spec-dirs": ["/etc/cdi"],
 "data-root": "$top/data", "exec-root": "$top/exec", "pidfile": "$top/docker.pid",
 "hosts": ["unix:///run/docker.sock"], "bridge": "none", "userland-proxy": false, "iptables": false, "ip6tables": false,
 "ip-forward": false, "max-concurrent-uploads": 12, "log-level": "warn"}
JSON
# Only what the host lacks comes from the pack.
for library in $top/lib/*; do
    ldconfig -p | grep -q "$(basename "$library") " || missing=1
done
[ -n "${missing:-}" ] && export LD_LIBRARY_PATH=$top/lib:${LD_LIBRARY_PATH:-}
answers() {
    python3 -c 'import socket as s; c = s.socket(s.AF_UNIX); c.connect("/run/docker.sock")
c.sendall(b"GET /_ping HTTP/1.0\r\n\r\n"); assert b"200 OK" in c.recv(99)' 2>/dev/null
}
answers && exit 0
setsid dockerd --config-file $top/daemon.json >$top/dockerd.log 2>&1 </dev/null &
for _ in $(seq 150); do
    answers && break
    sleep 0.2
done
answers || { tail -30 $top/dockerd.log; exit 1; }
echo "engine is up"
