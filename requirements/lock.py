"""Resolve requirements/{cpu,dev,gpu}.txt from pyproject.toml with pip's own resolver.

    python requirements/lock.py [--upgrade] [cpu dev gpu]

A lock is complete (every package, all `==`) and is installed with `--no-deps`. Present pins are kept where they still
satisfy pyproject.toml; `--upgrade` lets all of them move. Nothing is installed but pip itself, in a throwaway
environment; wheels are not downloaded where the index publishes their metadata.

pip must see `torch==X+cpu`, which is not on PyPI. Where pip is not configured for that, point PIP_FIND_LINKS at a
folder that holds the wheel.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "requirements"

# Resolves from published metadata, without downloading gigabytes of wheels as the pip in a new venv would.
PIP = "pip==26.3"

# PyPI's builds of these are CUDA builds: beside a CPU torch they make `import transformers` and `import vllm` crash.
# vLLM asks for them, text generation does not use them.
CUDA_ONLY = ("torchaudio", "torchcodec", "torchvision")

# One Python's markers decide what a lock holds. These have no wheels of another kind than x86-64 Linux.
GPU_PYTHON = "3.12"
GPU_TARGET = [
    "--only-binary=:all:",
    f"--python-version={GPU_PYTHON}",
    "--implementation=cp",
    "--platform=any",
    *(f"--platform=manylinux{year}_x86_64" for year in ("1", "2010", "2014")),
    *(f"--platform=manylinux_2_{minor}_x86_64" for minor in range(5, 40)),
]


@dataclass(frozen=True, kw_only=True)
class Lock:
    """One lock file: what goes into the resolver and what is kept out of the file."""

    summary: str
    extras: tuple[str, ...]
    pins: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    """Other locks whose pins hold here too, so that both files install side by side."""
    beside: tuple[str, ...] = ()
    """Locks this one is always installed on top of: a package that all of them hold is not repeated here."""
    python: str | None = None
    target: tuple[str, ...] = ()


LOCKS = {
    "cpu": Lock(summary="Runtime on CPU hosts.", extras=("cpu",), leave_out=CUDA_ONLY),
    "gpu": Lock(
        summary="Runtime on GPU hosts (x86-64 Linux, NVIDIA driver for CUDA 13).",
        extras=("gpu",),
        pins=("vllm==0.32.0",),
        python=GPU_PYTHON,
        target=tuple(GPU_TARGET),
    ),
    "dev": Lock(
        summary="Test and lint tools, on top of cpu.txt or gpu.txt.",
        extras=("dev",),
        constraints=("cpu",),
        beside=("cpu", "gpu"),
    ),
}


def canonical(name: str) -> str:
    """A distribution's name in the spelling of PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(name: str) -> dict[str, str]:
    """Name to version of a lock file; empty where there is none yet."""
    path = FOLDER / f"{name}.txt"
    if not path.exists():
        return {}
    lines = (line.strip() for line in path.read_text().splitlines())
    return dict(line.split("==", 1) for line in lines if line and not line.startswith("#"))


def interpreter(version: str | None) -> str:
    """A Python of this minor version from PATH, else the one that runs this script, with a warning."""
    found = shutil.which(f"python{version}") if version else sys.executable
    if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
        return found
    print(
        f"lock: no python{version} on PATH; environment markers are those of Python "
        f"{sys.version_info.major}.{sys.version_info.minor}",
        file=sys.stderr,
    )
    return sys.executable


def resolve(lock: Lock, requirements: list[str], pins: dict[str, str]) -> dict[str, str]:
    """What pip would install into an empty environment, as canonical name to version."""
    with tempfile.TemporaryDirectory(prefix="dray-lock-") as folder:
        tmp = Path(folder)
        subprocess.run([interpreter(lock.python), "-m", "venv", tmp / "venv"], check=True)
        pip = [str(tmp / "venv/bin/python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, PIP], check=True)
        (tmp / "constraints.txt").write_text("".join(f"{n}=={v}\n" for n, v in pins.items()))
        report = tmp / "report.json"
        target = [*lock.target, f"--target={tmp / 'target'}"] if lock.target else []
        options = ["--dry-run", "--ignore-installed", f"--constraint={tmp / 'constraints.txt'}"]
        done = subprocess.run([*pip, *options, f"--report={report}", *target, *requirements])
        if done.returncode:
            sys.exit("lock: pip found no solution; see above. `--upgrade` lets the present pins move.")
        installs = json.loads(report.read_text())["install"]
    return {canonical(i["metadata"]["name"]): i["metadata"]["version"] for i in installs}


def make(name: str, *, upgrade: bool) -> None:
    """Resolve one lock and write its file."""
    lock = LOCKS[name]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [r for extra in lock.extras for r in project["optional-dependencies"][extra]]
    kept = {} if upgrade else read_lock(name)
    for other in lock.constraints:
        kept |= read_lock(other)
    found = resolve(lock, [*project["dependencies"], *extras, *lock.pins], kept)
    others = [read_lock(other) for other in lock.beside]
    for package in [p for p in found if others and all(p in other for other in others)]:
        del found[package]
    for package in lock.leave_out:
        found.pop(package, None)
    lines = [
        f"# {lock.summary} Generated by `make lock` from pyproject.toml; install with --no-deps.",
        *([f"# Left out on purpose (see lock.py): {', '.join(lock.leave_out)}."] if lock.leave_out else []),
        *(f"{package}=={version}" for package, version in sorted(found.items())),
    ]
    (FOLDER / f"{name}.txt").write_text("\n".join(lines) + "\n")
    print(f"lock: requirements/{name}.txt holds {len(found)} packages")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--upgrade", action="store_true", help="let every pin move to the newest allowed version"
    )
    parser.add_argument("names", nargs="*", help="which locks; default: all")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(LOCKS))
    if unknown:
        parser.error(f"no such lock: {', '.join(unknown)}; there are {', '.join(LOCKS)}")
    # dev goes last: it leaves out what the two others hold.
    for name in (n for n in LOCKS if n in (args.names or LOCKS)):
        make(name, upgrade=args.upgrade)


if __name__ == "__main__":
    main()
