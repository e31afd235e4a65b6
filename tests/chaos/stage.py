"""What a trial is played on: an input, a job file, an output that is watched, and an environment of its own."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from tests.chaos.reader import Place
from tests.chaos.result import Config, Result
from tests.chaos.watch import Watch
from tests.local.fault_proxy import FaultProxy
from tests.local.runs import job

ROWS = 300
SHARD_ROWS = 25

ENVIRONMENT = {
    # Many drivers, workers and engines side by side: each computes on one thread.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ARROW_NUM_THREADS": "2",
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    # Everything stays on loopback.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    # A dozen clusters share /dev/shm, and as many engines the memory (GiB).
    "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(100 * 2**20),
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


class Stage:
    """Input and output of one trial, on this disk or in a bucket behind a fault proxy."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.engine = config.engine
        self.dice = random.Random(f"{config.fault} {config.engine} {config.seed}")
        self.result = Result(fault=config.fault, engine=config.engine, seed=config.seed, folder=str(folder))
        self.answers: dict[str, str] = json.loads(Path(config.pool).read_text())
        self.errors: dict[str, frozenset[str]] = {}
        """Errors that are due: row → codes, any of which will do."""
        self.at_end: list[Callable[[], Any]] = []
        self.proxy: FaultProxy | None = None
        self.watch: Watch | None = None

    def prepare(
        self,
        *,
        s3: bool = False,
        output: Path | None = None,
        edit: Callable[[list[str | None]], None] | None = None,
        files: int = 2,
        **sections: Any,
    ) -> None:
        """Write the input and the job file. `edit` may change the questions in place; `sections` go into the job."""
        pool = sorted(self.answers)
        questions: list[str | None] = [*self.dice.sample(pool, ROWS)]
        if edit:
            edit(questions)
        if s3:
            self._in_a_bucket()
        else:
            self.source = Place(fs.LocalFileSystem(), f"{self.folder}/in", f"{self.folder}/in")
            target = str(output or self.folder / "out")
            self.output = Place(fs.LocalFileSystem(), target, target)
            self.source.files.create_dir(self.source.path)
        step = -(-ROWS // files)
        self.per_file = step
        for number in range(files):
            self.write(f"q{number:03d}.parquet", questions[number * step : (number + 1) * step])
        self.settings = self._settings(sections)
        self.job_file = self.folder / "job.yaml"
        self.job_file.write_text(json.dumps(self.settings))
        self.watch = Watch(self.output, every_s=0.3 if s3 else 0.05)
        self.watch.start()

    def row_name(self, number: int) -> str:
        """Row `number` of the input as the reader calls it."""
        return f"q{number // self.per_file:03d}.parquet#{number % self.per_file}"

    def write(self, name: str, questions: Sequence[str | None]) -> None:
        """Put one input file, whole."""
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"question": pa.array(questions, pa.string())}), sink)
        if self.source.url.startswith("s3://"):
            with self.source.files.open_output_stream(f"{self.source.path}/{name}") as file:
                file.write(sink.getvalue())
            return
        fresh = self.folder / "fresh"
        fresh.write_bytes(sink.getvalue().to_pybytes())
        fresh.rename(Path(self.source.path) / name)

    def _in_a_bucket(self) -> None:
        assert self.config.s3 is not None
        server = self.config.s3
        files = fs.S3FileSystem(
            endpoint_override=server["endpoint_url"].removeprefix("http://"),
            scheme="http",
            access_key=server["key"],
            secret_key=server["secret"],
            region="us-east-1",
            allow_bucket_creation=True,
        )
        bucket = f"chaos-{self.config.engine}-{self.config.fault}-{self.config.seed}".replace("_", "-")
        files.create_dir(bucket)
        self.result.store = "s3"
        self.source = Place(files, f"{bucket}/in", f"s3://{bucket}/in")
        self.output = Place(files, f"{bucket}/out", f"s3://{bucket}/out")
        stack = contextlib.ExitStack()
        self.proxy = stack.enter_context(FaultProxy(server["endpoint_url"]))
        self.at_end.append(stack.close)
        os.environ |= {
            "AWS_ENDPOINT_URL": self.proxy.url,
            "AWS_ACCESS_KEY_ID": server["key"],
            "AWS_SECRET_ACCESS_KEY": server["secret"],
            "AWS_REGION": "us-east-1",
        }

    def _settings(self, sections: Mapping[str, Any]) -> dict[str, Any]:
        if self.engine == "simulated":
            # Two engines, 300 answers of 18 tokens on average: about seven seconds of work.
            base: dict[str, dict[str, Any]] = {
                "model": {"simulated": {"tokens_per_s": 400}},
                "pool": {"replicas": 2, "shards_in_flight": 2},
            }
        else:
            # One engine, few answers at a time: some ten seconds of work.
            base = {
                "model": {"backend": "vllm", "engine": {"max_num_seqs": 8}},
                "pool": {"replicas": 1, "shards_in_flight": 2, "admission": {"policy": "continuous"}},
            }
        base["shards"] = {"rows": SHARD_ROWS}
        base["errors"] = {"max_error_rate": 0.1}
        base["cluster"] = {"num_cpus": 4}
        for name, section in sections.items():
            base[name] = _merged(base.get(name, {}), section)
        self.engines = int(base["pool"]["replicas"])
        self.shards_each = int(base["pool"]["shards_in_flight"])
        return job(self.source.url, self.output.url, **base)


def _merged(base: Mapping[str, Any], over: Any) -> Any:
    if not isinstance(over, Mapping):
        return over
    merged = dict(base)
    for key, value in over.items():
        merged[key] = _merged(base.get(key, {}), value) if isinstance(base.get(key), Mapping) else value
    return merged
