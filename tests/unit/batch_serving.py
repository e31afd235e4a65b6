"""A server of the batch API in the test's own process, its clients, and runs by the stages alone with the simulated engine."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import yaml
from openai.types import Batch
from starlette.testclient import TestClient

from jobs.access_log import AccessLog
from jobs.api_keys import ApiKeys, new_key
from jobs.batch_api import BatchApi
from jobs.batch_store import BatchStore
from jobs.batch_worker import BatchWorker
from jobs.books import SUCCESS
from jobs.served_models import served_models
from pipelines.storage import Storage
from tests.local.runs import TINY
from tests.unit.stages import planned, run

MODEL = "tiny"


class ByStages:
    """A run of a job by its stages, in a thread; as many of its shards as it is let."""

    most: int | None = None
    code = 130

    def __init__(self, job: bytes) -> None:
        self.ended, self.error = threading.Event(), ""
        self.thread = threading.Thread(target=self._run, args=(yaml.safe_load(job),))
        self.thread.start()

    def _run(self, settings: Any) -> None:
        output = planned(settings)
        run(output.work("stages"), output.plan.shards[: self.most])
        if self.most is None:
            output.storage.write(SUCCESS, b"")  # the runner's, when the books balance
        elif self.code == 130:
            self.ended.wait(60)

    def is_on(self) -> bool:
        return self.thread.is_alive()

    def end(self) -> None:
        self.ended.set()

    def result(self) -> tuple[int, str]:
        self.thread.join()
        return (0, "") if self.most is None else (self.code, "/some/path: broke")


class Half(ByStages):
    """Does the first shard, and then nothing until it is ended."""

    most = 1

    @staticmethod
    def is_there(folder: Path) -> bool:
        return bool(list(folder.glob("store/batches/*/work/out/data/*.parquet")))


class Killed(Half):
    """Does the first shard, and is killed."""

    code = -9


class Broken(Half):
    """Does the first shard, and fails."""

    code = 1


class Flaky(Storage):
    """Fails the first time that something is written below a folder, each folder and kind of object once."""

    def __init__(self, root: str, fault: type[Exception]) -> None:
        super().__init__(root)
        self.fault, self.seen = fault, set[str]()

    def write(self, name: str, data: bytes) -> None:
        kind = f"{name.split('/')[0]}/{json.loads(data).get('status')}"
        if kind not in self.seen:
            self.seen.add(kind)
            raise self.fault(f"{name}: not now")
        super().write(name, data)


class Server:
    """A server on one folder, and its clients."""

    def __init__(
        self,
        folder: Path,
        *,
        store: str | None = None,
        keyed: bool = False,
        max_file_bytes: int = 1_000_000,
        **sections: Any,
    ) -> None:
        self.folder, self.now = folder, time.time()
        job = folder / "job.yaml"
        model = {"source": str(TINY), "backend": "simulated", "simulated": {"tokens_per_s": 1e7}}
        job.write_text(json.dumps({"model": model, "shards": {"rows": 5}, **sections}))
        self.store = BatchStore(Storage(store or str(folder / "store")), clock=lambda: self.now)
        self.start: Callable[[bytes], Any] = ByStages
        self.worker = BatchWorker(
            self.store,
            served_models([f"{MODEL}={job}"]),
            start=lambda content: self.start(content),
            clock=lambda: self.now,
        )
        self.key_file = folder / "keys.txt"
        if keyed:
            self.keys = {name: new_key(name, str(self.key_file)) for name in ("ann", "bob")}
        self.log = io.StringIO()
        api = BatchApi(
            self.store,
            self.worker,
            ApiKeys(str(self.key_file)) if keyed else None,
            max_file_bytes=max_file_bytes,
        )
        self.app = api.app(AccessLog(self.log, queued=lambda: len(self.store.waiting())))

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(
            api_key=key,
            base_url="http://testserver/v1",
            max_retries=0,
            http_client=TestClient(self.app, raise_server_exceptions=False),
        )

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The access log."""
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    @contextmanager
    def working(self) -> Iterator[None]:
        thread = threading.Thread(target=self.worker.run)
        thread.start()
        try:
            yield
        finally:
            self.worker.stop()
            thread.join()


def lines(count: int, **body: Any) -> bytes:
    """A batch file."""
    asked = [
        {
            "custom_id": f"row-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": MODEL, "messages": [{"role": "user", "content": f"say {number}"}], **body},
        }
        for number in range(count)
    ]
    return "".join(json.dumps(line) + "\n" for line in asked).encode()


def uploaded(client: openai.OpenAI, data: bytes) -> str:
    return client.files.create(file=("batch.jsonl", data), purpose="batch").id


def created(client: openai.OpenAI, data: bytes) -> Batch:
    return client.batches.create(
        input_file_id=uploaded(client, data), endpoint="/v1/chat/completions", completion_window="24h"
    )


def ended(client: openai.OpenAI, id_: str) -> Batch:
    deadline = time.monotonic() + 60
    while (batch := client.batches.retrieve(id_)).status not in (
        "completed",
        "failed",
        "cancelled",
        "expired",
    ):
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)
    return batch


def told(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of a file."""
    assert file_id is not None
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
