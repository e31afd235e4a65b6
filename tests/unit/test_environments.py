"""environment.yml and deploy/Dockerfile install what requirements/gpu.txt pins, on the Python and CUDA it was made for."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"


def _pins() -> list[str]:
    lines = (ROOT / "requirements/gpu.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _lock_python() -> str:
    found = re.search(r'^GPU_PYTHON = "(.+)"$', (ROOT / "requirements/lock.py").read_text(), re.MULTILINE)
    assert found
    return found[1]


def test_environment_yml_is_what_the_lock_gives_today(tmp_path: Path) -> None:
    anew = tmp_path / "environment.yml"
    subprocess.run([sys.executable, ROOT / "requirements/conda.py", anew], check=True, capture_output=True)
    assert (ROOT / "environment.yml").read_text() == anew.read_text(), "run `make lock`"


def test_environment_yml_has_every_pin_and_nothing_of_condas_own() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *condas, pips = environment["dependencies"]
    assert condas == [f"python={_lock_python()}", "pip"]
    assert [line for line in pips["pip"] if not line.startswith("--")] == _pins()
    assert pips["pip"][-1] == "--editable=."


def _instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, with comments dropped and continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (x.partition(" ") for x in joined.splitlines() if x)]


def _values(name: str) -> list[str]:
    return [rest for instruction, rest in _instructions() if instruction == name]


def test_the_image_has_the_locks_cuda_and_python() -> None:
    [base] = _values("FROM")
    image = re.fullmatch(r"nvidia/cuda:(\d+\.\d+\.\d+)-base-ubuntu24\.04", base)
    assert image, f"{base}: want an exact tag"
    toolkit = dict(pin.split("==") for pin in _pins())["cuda-toolkit"]
    assert toolkit.startswith(image[1]), f"the image has CUDA {image[1]}, the lock cuda-toolkit {toolkit}"
    text = " ".join(_values("RUN"))
    assert set(re.findall(r"python3\.\d+", text)) == {f"python{_lock_python()}"}


def test_the_image_installs_the_lock_as_make_setup_does() -> None:
    installs = [run for run in _values("RUN") if "install.py" in run]
    assert [run.split("install.py ")[1] for run in installs] == [
        "--venv /opt/venv --device gpu runtime",
        "--venv /opt/venv project",
    ]
    assert all(run.startswith("PIP_NO_CACHE_DIR=1 ") for run in installs)
    assert not [run for run in _values("RUN") if "pip install" in run]


def test_the_image_runs_as_a_numbered_user_that_is_not_root() -> None:
    instructions = _instructions()
    users = [i for i, (name, _) in enumerate(instructions) if name == "USER"]
    assert [instructions[i][1] for i in users] == ["10001:10001"]
    installs = [i for i, (_, rest) in enumerate(instructions) if "install.py" in rest]
    assert installs
    assert users[0] < min(installs)


def test_what_the_image_copies_is_let_through_and_nothing_else() -> None:
    copied = {
        source for rest in _values("COPY") for source in rest.split()[:-1] if not source.startswith("--")
    }
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)
    # A line that would take away again what was let through would make the build fail, or worse, differ.
    taken = [rule for rule in rules[1:] if not rule.startswith("!")]
    assert not [s for s in copied for rule in taken if fnmatch.fnmatch(f"/{s}", rule.replace("**", "*"))]


def test_hadolint() -> None:
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if not hadolint:
        pytest.skip("hadolint is not installed (make lint installs it)")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
