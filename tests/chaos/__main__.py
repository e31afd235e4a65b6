"""The chaos suite: faults at random moments, and a count of every row afterwards.

    python -m tests.chaos                                        every fault: 20 trials, and 3 with real vLLM
    python -m tests.chaos --short --jobs 2                       one trial each of eight faults, for CI
    python -m tests.chaos --jobs 12 --out results.json           twelve at a time
    python -m tests.chaos --fault driver_sigkill --engine simulated --seed 17 --trials 1 --keep

A trial writes 300 questions, runs a job over them by the command line on a Ray of its own, lets one fault strike at a
moment that its seed chooses, runs the job again where the driver ended, and has an independent reader (`reader.py`,
pyarrow alone) count: rows lost, rows doubled, answers that differ from an undisturbed greedy run, errors that are not
due. Where a fault needs vLLM (`EngineCore`) it gets all its trials with it. Trials share nothing but the machine and one
S3 server (moto, a bucket each, behind a fault proxy each).

Prints a Markdown table; `--out` gets the table's data, one object a trial. Exit code 1 when a row was lost or doubled, an
answer differs, a run did not recover, more was repeated than was in flight, or a process stayed behind. A failed trial
keeps its folder (drivers' output, Ray's logs), and its line says which; `--fault`, `--engine` and `--seed` play it again.

Seconds of one trial: 20 to 60 on two cores with the simulated engine, 60 to 200 with vLLM on a CPU. Needs Linux; a full
disk and a driver on another host need root, and are skipped with the reason otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from pyarrow import fs

from tests.chaos.faults import FAULTS
from tests.chaos.reader import Place, answers_of
from tests.chaos.result import Config, Result
from tests.chaos.stage import ENVIRONMENT
from tests.chaos.table import render
from tests.local.runs import ROOT, job, write_questions
from tests.local.s3_server import moto

#: One fault of each kind, without vLLM: two of those at a time are more than two cores can do in CI's time.
SHORT = (
    ("driver_sigkill", "simulated"),
    ("actor_sigkill", "simulated"),
    ("node_removed", "simulated"),
    ("s3_reset_after_put", "simulated"),
    ("disk_full", "simulated"),
    ("two_drivers", "simulated"),
    ("poison_crashes", "simulated"),
    ("row_errors", "simulated"),
)
#: Distinct questions that trials draw theirs from.
POOL_ROWS = 800


def play(config: Config) -> Result:
    """One trial in a process of its own, which ends all that it started."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        told, result = Path(scratch) / "config.json", Path(scratch) / "result.json"
        told.write_text(json.dumps(asdict(config)))
        done = subprocess.run(
            [sys.executable, "-m", "tests.chaos.trial", str(told), str(result)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": _python_path()},
            capture_output=True,
            text=True,
        )
        if result.exists():
            return Result(**json.loads(result.read_text()))
    return Result(
        fault=config.fault,
        engine=config.engine,
        seed=config.seed,
        problem=f"the trial broke: {done.stderr[-400:]}",
    )


def undisturbed(engine: str, overrides: list[str], folder: Path) -> Path:
    """Answer the whole pool once without any fault; a JSON file: question → answer."""
    write_questions(folder / "in", rows=POOL_ROWS)
    model = {"simulated": {"tokens_per_s": 1e6}} if engine == "simulated" else {"backend": "vllm"}
    settings = job(folder / "in", folder / "out", model=model, cluster={"num_cpus": 4})
    (folder / "job.yaml").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "run", str(folder / "job.yaml"), "--quiet", *overrides],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": _python_path(), "DRAY_LOGS": str(folder / "logs")},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"the undisturbed run failed: {done.stderr}")
    answers = answers_of(Place(fs.LocalFileSystem(), f"{folder}/out", ""))
    (folder / "answers.json").write_text(json.dumps(answers))
    return folder / "answers.json"


@contextlib.contextmanager
def stage(
    configs: list[tuple[str, str, int]], overrides: list[str], *, keep: bool = False
) -> Iterator[list[Config]]:
    """What trials share: the S3 server and the undisturbed answers; (fault, engine, seed) as configurations."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        s3 = None
        if any(FAULTS[fault].s3 for fault, _, _ in configs):
            s3 = {
                name: value
                for name, value in stack.enter_context(moto()).storage_options.items()
                if name in ("endpoint_url", "key", "secret")
            }
        engines = sorted({engine for _, engine, _ in configs})
        settings = {engine: overrides if engine == "vllm" else [] for engine in engines}
        pools = {engine: undisturbed(engine, settings[engine], folder / engine) for engine in engines}
        yield [
            Config(
                fault=fault,
                engine=engine,
                seed=seed,
                pool=str(pools[engine]),
                s3=s3,
                overrides=settings[engine],
                keep=keep,
            )
            for fault, engine, seed in configs
        ]


def chosen(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """The trials asked for, seed by seed, so that an early end leaves some of every fault."""
    if args.short:
        return [(name, engine, args.seed) for name, engine in SHORT if args.engine in (engine, "both")]
    trials = []
    for name in args.fault or FAULTS:
        for engine in FAULTS[name].engines:
            if args.engine in (engine, "both"):
                alone = FAULTS[name].engines == (engine,)
                few = engine == "vllm" and not alone and args.vllm_trials is not None
                count = args.vllm_trials if few else args.trials
                trials += [(name, engine, args.seed + i) for i in range(count)]
    return sorted(trials, key=lambda trial: (trial[2], trial[1]))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help=f"one trial each of {', '.join(name for name, _ in SHORT)}",
    )
    parser.add_argument("--trials", type=int, default=20, help="trials of each fault")
    parser.add_argument("--vllm-trials", type=int, default=3, help="of those that need no vLLM, with it")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time; two cores each are right")
    parser.add_argument(
        "--fault", action="append", choices=list(FAULTS), metavar="NAME", help=", ".join(FAULTS)
    )
    parser.add_argument("--engine", choices=["simulated", "vllm", "both"], default="both")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for jobs with vLLM")
    parser.add_argument("--keep", action="store_true", help="keep the folders of sound trials as well")
    parser.add_argument("--out", type=Path, help="results as JSON, written anew after every trial")
    args = parser.parse_args()
    configs = chosen(args)
    results: list[Result] = []

    def one(config: Config) -> None:
        result = play(config)
        results.append(result)
        line = f"{len(results)}/{len(configs)} {result.fault} {result.engine} seed {result.seed}: {result.outcome}"
        line += f", {result.seconds:.0f} s, drivers {result.drivers}"
        if result.outcome != "ok":
            line += f": {result.problem or result.note} {result.folder}"
        print(line, file=sys.stderr, flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            fresh = args.out.with_suffix(".tmp")
            fresh.write_text(json.dumps([asdict(r) for r in list(results)], indent=1))
            shutil.move(fresh, args.out)

    began = time.monotonic()
    with stage(configs, args.set, keep=args.keep) as ready, ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, ready))
    print(render(results))
    print(f"\n{len(results)} trials in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return int(any(result.outcome == "failed" for result in results))


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


if __name__ == "__main__":
    sys.exit(main())
