"""One self-instruct task in Dray, distilabel and Ray Data LLM: lines, speed, a kill in the middle, a row that cannot be answered.

    python benchmarks/self_instruct/compare.py --distilabel /path/to/its/python --rows 300 --out results

Each way asks the tiny model for a task unlike three (JSON by a schema), takes it apart, measures its novelty and has it
solved; `job.yaml`, `with_distilabel.py` and `with_ray_data.py` are all that a user writes. distilabel lives in an environment
of its own (`pip install "distilabel[openai]"`) and asks the OpenAI-compatible server of this one's vLLM, whose start counts in the time.

- clean: `--rows` rows. Lines: those of the user's file that are neither blank nor comment nor docstring.
- kill: the same, SIGKILL to all of its processes after 0.7 of the clean run's time (the server lives on, and is started
  only once); then the same command again, to its end. Lost: input ids that the output lacks; doubled: those it has twice.
- bad row: 60 rows of which one has more tokens than the model takes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks import child
from benchmarks.machine import ROOT, machine

HERE = Path(__file__).resolve().parent
MODEL = ROOT / "examples" / "tiny-model"
KILL_AT = 0.7
#: A run that takes longer than three clean ones, and than this, is killed: exit -9.
LEAST_LIMIT_S = 120.0
BAD = "a word " * 500


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to do the task."""

    name: str
    file: Path
    command: Callable[[Path, str], list[str]]
    """Of a folder with `in/`, and the server's URL."""
    output: str
    served: bool = False


def main() -> int:
    """Every way and case once; a table, and JSON in `--out`."""
    args = _arguments()
    ways = [
        Way(
            name="Dray",
            file=HERE / "job.yaml",
            command=lambda folder, url: child.dray(
                "run", str(HERE / "job.yaml"), f"input.path={folder}/in", f"output.path={folder}/out", "--quiet",
                f"model.source={MODEL}",
            ),
            output="out/data",
        ),
        Way(
            name="Ray Data LLM",
            file=HERE / "with_ray_data.py",
            command=lambda folder, url: [
                sys.executable, str(HERE / "with_ray_data.py"), str(MODEL), f"{folder}/in", f"{folder}/out"
            ],
            output="out",
        ),
        Way(
            name="distilabel",
            file=HERE / "with_distilabel.py",
            command=lambda folder, url: [
                args.distilabel, str(HERE / "with_distilabel.py"), url, f"{folder}/in", f"{folder}/out.parquet"
            ],
            output="out.parquet",
            served=True,
        ),
    ]  # fmt: skip
    found: dict[str, Any] = {"machine": machine(), "rows": args.rows, "ways": {}}
    args.out.mkdir(parents=True, exist_ok=True)
    for way in ways:
        if args.way and way.name not in args.way:
            continue
        found["ways"][way.name] = _all_cases(way, args.rows, args.out / way.name.replace(" ", "-"))
        (args.out / "self_instruct.json").write_text(json.dumps(found, indent=1) + "\n")
        print(way.name, json.dumps(found["ways"][way.name]), flush=True)
    return 0


def _all_cases(way: Way, rows: int, folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = {"lines": lines(way.file)}
    clean = _folder(folder / "clean", rows)
    began = time.monotonic()
    with server(folder) if way.served else nullcontext("") as url:
        ready_s = time.monotonic() - began
        code = _run(way, clean, url)
        whole_s = time.monotonic() - began
        result["clean"] = {"seconds": whole_s, "exit": code, **count(clean, way, rows)}
        limit_s = max(LEAST_LIMIT_S, 3 * whole_s)
        killed = _folder(folder / "kill", rows)
        first = _run(way, killed, url, kill_after=KILL_AT * (whole_s - ready_s))
        again = time.monotonic()
        code = _run(way, killed, url, kill_after=limit_s)
        result["kill"] = {
            "killed": first == -signal.SIGKILL,
            "second_run_seconds": time.monotonic() - again,
            "exit": code,
            **count(killed, way, rows),
        }
        bad = _folder(folder / "bad", 60, bad=17)
        code = _run(way, bad, url, kill_after=limit_s)
        result["bad row"] = {"exit": code, **count(bad, way, 60)}
    return result


def lines(file: Path) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    text = file.read_text()
    if file.suffix == ".py":
        text = text.split('"""', 2)[2]
    return sum(1 for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))


def count(folder: Path, way: Way, rows: int) -> dict[str, Any]:
    """Ids in the output against those of the input."""
    place = folder / way.output
    table = pq.read_table(place) if place.exists() else pa.table({})
    if "id" not in table.column_names:
        return {"rows": 0, "lost": rows, "doubled": 0, "failed": 0}
    ids = Counter(table["id"].to_pylist())
    failed = table["error_code"].drop_null() if "error_code" in table.column_names else []
    given = set(pq.read_table(folder / "in", columns=["id"])["id"].to_pylist())
    return {
        "rows": len(table),
        "lost": len(given - ids.keys()),
        "doubled": sum(n - 1 for n in ids.values()),
        "failed": len(failed),
    }


def _folder(folder: Path, rows: int, bad: int | None = None) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "in").mkdir(parents=True)
    command = [sys.executable, str(ROOT / "examples" / "corpus.py"), "tasks", str(folder / "tasks.parquet")]
    subprocess.run([*command, "--rows", str(rows)], check=True, cwd=ROOT)
    table = pq.read_table(folder / "tasks.parquet")
    if bad is not None:
        tasks = table["tasks"].to_pylist()
        tasks[bad] = [BAD, *tasks[bad][1:]]
        place = table.column_names.index("tasks")
        table = table.set_column(place, "tasks", pa.array(tasks, table.schema.field("tasks").type))
    pq.write_table(table, folder / "in" / "tasks.parquet")
    return folder


def _run(way: Way, folder: Path, url: str, kill_after: float | None = None) -> int:
    """The command's exit code; killed with all that it started after so many seconds."""
    env = child.environment({"DRAY_LOGS": str(folder / "logs"), "VLLM_CPU_KVCACHE_SPACE": "1"})
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            way.command(folder, url), cwd=ROOT, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
        try:
            return process.wait(kill_after)
        except subprocess.TimeoutExpired:
            _kill(process)
            return process.wait()


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(psutil.NoSuchProcess):
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """`vllm serve` with the limits of the other ways."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL), "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "512",
        "--max-num-seqs", "64", "--max-num-batched-tokens", "2048", "--enforce-eager",
    ]  # fmt: skip
    env = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
    }
    with (folder / "server.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=folder)
        try:
            for _ in range(300):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except OSError:
                    if process.poll() is not None:
                        raise SystemExit(f"the server ended: {folder}/server.txt") from None
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _kill(process)
            process.wait()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--distilabel", default="python", help="the Python of an environment with distilabel[openai]"
    )
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--way", action="append", help="only this one: Dray, Ray Data LLM or distilabel")
    parser.add_argument("--out", type=Path, default=Path("bench-self-instruct"))
    args = parser.parse_args()
    args.out = args.out.resolve()
    return args


if __name__ == "__main__":
    sys.exit(main())
