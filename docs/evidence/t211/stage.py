"""On the GPU host: gather the files of the image from this host, as hard links, split into even layers.

    python3 stage.py TARGET --python 3.12 --wheels DIR --programs DIR [--layers 12] [--also xformers]

Debian packages come by dpkg's own lists and dependencies, Python packages by their RECORD and Requires-Dist:
what is not needed is not copied, and what is needed is not forgotten (Triton's entry points in its
dist-info, gcc's cc1 in /usr/libexec). Wheels replace the host's packages of the same name; `--programs` go to
/usr/local/bin. TARGET/inventory.txt lists every package with its version and where it came from.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

SYSTEM = (
    "bash coreutils findutils grep sed libc-bin gcc g++ libc6-dev ca-certificates python{0} libpython{0}-dev"
)
# made by installation scripts, so in no package's list
MADE = ("/etc/alternatives", "/etc/ssl/certs/ca-certificates.crt", "/etc/ld.so.conf", "/etc/ld.so.conf.d")
ROOTS = ("torch", "triton", "safetensors", "tokenizers", "regex", "pillow", "huggingface-hub")


def system_packages(wanted: list[str]) -> set[str]:
    """`wanted` and all that they depend on, as installed here."""
    fields = "${Package}\t${Status}\t${Pre-Depends}, ${Depends}\t${Provides}\n"
    query = ["dpkg-query", "-W", "-f", fields]
    depends, provided = {}, {}
    for line in subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines():
        name, status, needs, provides = line.split("\t")
        if "ok installed" in status:
            depends[name] = needs
            provided.update(dict.fromkeys(re.findall(r"[a-z0-9][a-z0-9+.-]+", provides), name))
    found: set[str] = set()
    queue = list(wanted)
    while queue:
        name = queue.pop()
        name = name if name in depends else provided.get(name, "")
        if name and name not in found:
            found.add(name)
            for clause in depends[name].split(","):
                options = [re.sub(r"[ (:].*", "", option.strip()) for option in clause.split("|")]
                queue += [option for option in options if option in depends or option in provided][:1]
    return found


def python_packages(roots: tuple[str, ...], own: set[str]) -> dict[str, metadata.Distribution]:
    """`roots` and their requirements on this platform, without those that `own` wheels replace."""
    found: dict[str, metadata.Distribution] = {}
    done: set[tuple[str, str]] = set()
    queue = [(name, "") for name in roots]
    while queue:
        name, extra = queue.pop()
        if (name, extra) in done or name in own:
            continue
        done.add((name, extra))
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            print(f"not on this host: {name}")  # noqa: T201
            continue
        for text in found[name].requires or ():
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                queue += [(canonicalize_name(need.name), more) for more in (*need.extras, "")]
    return found


def link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where that can't be; a symlink stays one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        if not target.is_symlink():
            target.symlink_to(source.readlink())
        return
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:
        shutil.copy2(source, target)


def tree(source: Path, target: Path) -> None:
    """`link` for a file, or for all below a folder."""
    if source.is_dir() and not source.is_symlink():
        for child in source.iterdir():
            tree(child, target / child.name)
    else:
        link(source, target)


def copy_system(names: set[str], target: Path) -> None:
    """Every file of these Debian packages, under its real path (lib → usr/lib)."""
    for listing in Path("/var/lib/dpkg/info").glob("*.list"):
        if listing.stem.partition(":")[0] not in names:
            continue
        for line in listing.read_text().splitlines():
            path = Path(line)
            if path.parts[:4] == ("/", "usr", "share", "doc") and path.name != "copyright":
                continue
            if path.parts[:4] in (("/", "usr", "share", "man"), ("/", "usr", "share", "locale")):
                continue
            root_link = path.is_symlink() and len(path.parts) == 2  # /lib → usr/lib: made below
            if (path.is_file() or path.is_symlink()) and not root_link:
                real = path.parent.resolve() / path.name
                link(real, target / real.relative_to("/"))
    for place in MADE:
        tree(Path(place), target / place.lstrip("/"))
    for place in Path("/usr/bin").iterdir():  # cc, c++: links of update-alternatives
        if place.is_symlink() and str(place.readlink()).startswith("/etc/alternatives/") and place.exists():
            link(place, target / "usr/bin" / place.name)


def finish_root(target: Path, python: str) -> None:
    """Root links, users, empty folders, and the environment that the packages go into."""
    for name in ("bin", "sbin", "lib", "lib64"):
        if not (target / name).exists():
            (target / name).symlink_to(f"usr/{name}")
    if not (target / "usr/bin/sh").exists():  # Ubuntu's ldconfig is a shell script
        (target / "usr/bin/sh").unlink(missing_ok=True)
        shutil.copy2(Path("/bin/sh").resolve(), target / "usr/bin/sh")
    (target / "etc").mkdir(exist_ok=True)
    (target / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/bash\nmt:x:65532:65532:mtbuild:/tmp:/usr/sbin/nologin\n"
    )
    (target / "etc/group").write_text("root:x:0:\nmt:x:65532:\n")
    modes = {"tmp": 0o1777, "cache": 0o1777, "root": 0o700, "proc": 0o755, "sys": 0o755, "dev": 0o755}
    for name, mode in modes.items():
        (target / name).mkdir(exist_ok=True)
        (target / name).chmod(mode)
    venv = target / "opt/venv"
    (venv / "bin").mkdir(parents=True)
    settings = f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {python}\n"
    (venv / "pyvenv.cfg").write_text(settings)
    for name in ("python", "python3", f"python{python}"):
        (venv / "bin" / name).symlink_to(f"/usr/bin/python{python}")


def write_scripts(site: Path, folder: Path, packages: tuple[str, ...]) -> None:
    """Console scripts with the image's own Python in their first line (pip would write this host's)."""
    for distribution in metadata.distributions(path=[str(site)]):
        if canonicalize_name(distribution.metadata["Name"]) not in packages:
            continue
        for entry in distribution.entry_points:
            if entry.group == "console_scripts":
                script = folder / entry.name
                script.write_text(
                    "#!/opt/venv/bin/python3\nimport sys\n"
                    f"from {entry.module} import {entry.attr}\nsys.exit({entry.attr}())\n"
                )
                script.chmod(0o755)


def write_inventory(site: Path, debian: set[str], own: set[str], target: Path) -> None:
    """What is in the image, sorted: this takes the place of a lock in the build's id."""
    lines = [f"{line} (host)" for line in debian]
    for distribution in metadata.distributions(path=[str(site)]):
        name = canonicalize_name(distribution.metadata["Name"])
        lines.append(f"{name}=={distribution.version} ({'wheel' if name in own else 'host'})")
    target.write_text("\n".join(sorted(lines)) + "\n")


def versions_of(names: set[str]) -> set[str]:
    """`name=version` of installed Debian packages."""
    query = ["dpkg-query", "-W", "-f", "${Package}=${Version}\n", *sorted(names)]
    return set(subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines())


def split(source: Path, target: Path, count: int) -> None:
    """The files of `source` in `count` trees of about the same size: a layer is compressed by one thread."""
    files = [path for path in source.rglob("*") if path.is_symlink() or path.is_file()]
    sizes = [0] * count
    for path in sorted(files, key=lambda path: path.lstat().st_size, reverse=True):
        least = sizes.index(min(sizes))
        sizes[least] += path.lstat().st_size
        link(path, target / f"layer{least}" / path.relative_to(source))
    print(f"layers of {min(sizes) >> 20} to {max(sizes) >> 20} MiB")  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--python", required=True)
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--programs", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--also", nargs="*", default=[])
    options = parser.parse_args()
    root, packages = options.target / "root", options.target / "packages"
    names = system_packages(SYSTEM.format(options.python).split())
    copy_system(names, root)
    finish_root(root, options.python)
    wheels = sorted(options.wheels.glob("*.whl"))
    own = {str(parse_wheel_filename(wheel.name)[0]) for wheel in wheels}
    found = python_packages((*ROOTS, *options.also), own)
    site = packages / f"opt/venv/lib/python{options.python}/site-packages"
    for distribution in found.values():
        for file in distribution.files or ():
            source = Path(distribution.locate_file(file))
            if ".." not in file.parts and "__pycache__" not in file.parts and source.exists():
                link(source, site / file)
    install = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", site]
    subprocess.run([sys.executable, *install, *wheels], check=True)
    shutil.rmtree(site / "bin", ignore_errors=True)  # scripts with this host's Python in their first line
    write_scripts(site, root / "opt/venv/bin", ("multitalk-runtime",))
    (root / "usr/local/bin").mkdir(parents=True, exist_ok=True)
    for program in options.programs.iterdir():
        link(program, root / "usr/local/bin" / program.name)
    write_inventory(site, versions_of(names), own, options.target / "inventory.txt")
    compiled = ["-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash"]
    subprocess.run(
        [f"/usr/bin/python{options.python}", *compiled, "-s", packages, "-p", "/", site], check=False
    )
    split(packages, options.target, options.layers)
    print(f"{len(names)} Debian packages, {len(found)} Python packages of the host, {len(wheels)} wheels")  # noqa: T201


if __name__ == "__main__":
    main()
