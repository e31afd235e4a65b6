"""The batch API as OpenAI's own client sees it; runs by the stages alone, with the simulated engine."""

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
import pytest
import yaml
from openai.types import Batch
from openai.types.chat import ChatCompletion
from starlette.testclient import TestClient

from jobs import api_keys, batch_worker
from jobs.access_log import AccessLog
from jobs.api_keys import ApiKeys, new_key
from jobs.batch_api import BatchApi
from jobs.batch_store import BatchStore
from jobs.batch_worker import BatchWorker
from jobs.books import SUCCESS
from jobs.served_models import served_models
from pipelines.errors import SpecError, StorageError, StorageFull, TransientStorageError
from pipelines.storage import Storage
from tests.local.runs import TINY
from tests.unit.stages import planned, run

pytestmark = pytest.mark.slow

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


class Server:
    """A server on one folder, and its clients."""

    def __init__(
        self, folder: Path, *, keyed: bool = False, max_file_bytes: int = 1_000_000, **sections: Any
    ) -> None:
        self.folder, self.now = folder, time.time()
        job = folder / "job.yaml"
        model = {"source": str(TINY), "backend": "simulated", "simulated": {"tokens_per_s": 1e7}}
        job.write_text(json.dumps({"model": model, "shards": {"rows": 5}, **sections}))
        self.store = BatchStore(Storage(str(folder / "store")), clock=lambda: self.now)
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


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


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


class TestModels:
    @pytest.mark.parametrize(
        ("job", "problem"),
        [
            (
                {"model": {"source": str(TINY)}, "input": {"path": "x"}},
                "input.path: the batch file says that",
            ),
            ({"pool": {"replicas": 1}}, "model: missing"),
            ({"model": {"source": str(TINY), "engine": {"tensor_parallel": 2}}}, "tensor_parallel"),
            (
                {"model": {"source": str(TINY)}, "output": {"storage_options": {"secret": "s3cr3t"}}},
                r"give it as \$\{env:NAME\}",
            ),
        ],
    )
    def test_what_cannot_be_served_is_known_at_the_start(
        self, tmp_path: Path, job: dict[str, Any], problem: str
    ) -> None:
        (tmp_path / "job.yaml").write_text(json.dumps(job))
        with pytest.raises(SpecError, match=problem):
            served_models([str(tmp_path / "job.yaml")])

    def test_a_name_is_of_one_model(self, tmp_path: Path) -> None:
        path = tmp_path / "job.yaml"
        path.write_text(json.dumps({"model": {"source": str(TINY)}}))
        assert list(served_models([str(path), f"other={path}"])) == [str(TINY), "other"]
        with pytest.raises(SpecError, match="served already"):
            served_models([f"a={path}", f"a={path}"])


class TestBatches:
    def test_each_request_is_answered_once_in_order(self, server: Server) -> None:
        client = server.client()
        batch = client.batches.create(
            input_file_id=uploaded(client, lines(12, max_tokens=8)),
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"team": "search"},
        )
        assert (batch.status, batch.metadata) == ("validating", {"team": "search"})
        with server.working():
            done = ended(client, batch.id)
        assert done.status == "completed"
        assert done.request_counts is not None
        assert done.request_counts.to_dict() == {"total": 12, "completed": 12, "failed": 0}
        assert done.error_file_id is None
        answers = told(client, done.output_file_id)
        assert [line["custom_id"] for line in answers] == [f"row-{number}" for number in range(12)]
        for line in answers:
            completion = ChatCompletion.model_validate(line["response"]["body"], strict=True)
            assert completion.choices[0].message.content
        assert client.files.retrieve(done.output_file_id or "").purpose == "batch_output"

    def test_what_cannot_be_answered_is_in_the_error_file(self, server: Server) -> None:
        client = server.client()
        good = lines(2, max_tokens=8).splitlines()
        bad = json.loads(good[0]) | {"custom_id": "empty"}
        bad["body"]["messages"] = [{"role": "user", "content": "  "}]
        batch = created(client, b"\n".join([good[0], json.dumps(bad).encode(), good[1]]))
        with server.working():
            done = ended(client, batch.id)
        assert [line["custom_id"] for line in told(client, done.output_file_id)] == ["row-0", "row-1"]
        (failed,) = told(client, done.error_file_id)
        assert (failed["custom_id"], failed["response"]["status_code"]) == ("empty", 400)

    def test_a_file_with_mistakes_fails_before_anything_is_asked(self, server: Server) -> None:
        server.start = lambda job: pytest.fail("it was run")
        client = server.client()
        batch = created(client, lines(2) + b'{"custom_id": "row-1", "method": "POST"}\n' + b"nonsense\n")
        with server.working():
            done = ended(client, batch.id)
        assert done.status == "failed"
        assert done.errors is not None
        assert done.errors.data is not None
        assert [mistake.line for mistake in done.errors.data] == [3, 4]

    @pytest.mark.parametrize(
        ("data", "code"),
        [
            (lines(1).replace(b'"tiny"', b'"gpt-9"'), "model_not_found"),
            (lines(1).replace(b"chat/completions", b"embeddings").replace(b"messages", b"input"), None),
            (lines(1, tools=[{"type": "function", "function": {"name": "f"}}]), "invalid_request"),
        ],
    )
    def test_what_is_not_served_fails(self, server: Server, data: bytes, code: str | None) -> None:
        client = server.client()
        batch = created(client, data)
        with server.working():
            done = ended(client, batch.id)
        assert done.status == "failed"
        assert done.errors is not None
        assert done.errors.data
        assert code in (None, done.errors.data[0].code)
        assert str(server.folder) not in done.to_json()

    def test_a_batch_is_taken_up_by_the_next_server(self, server: Server, tmp_path: Path) -> None:
        client = server.client()
        batch = created(client, lines(12, max_tokens=8))
        server.start = Half
        with server.working():
            while client.batches.retrieve(batch.id).status != "in_progress" or not Half.is_there(tmp_path):
                time.sleep(0.02)
        assert client.batches.retrieve(batch.id).status == "in_progress"
        again = Server(
            tmp_path, sampling={"top_p": 0.5}
        )  # served otherwise now; the batch goes on as it began
        with again.working():
            done = ended(again.client(), batch.id)
        assert done.status == "completed"
        answers = told(again.client(), done.output_file_id)
        assert [line["custom_id"] for line in answers] == [f"row-{number}" for number in range(12)]

    @pytest.mark.parametrize("how", ["cancelled", "expired"])
    def test_what_was_answered_until_its_end_is_given(self, server: Server, tmp_path: Path, how: str) -> None:
        client = server.client()
        batch = created(client, lines(12, max_tokens=8))
        server.start = Half
        with server.working():
            while not Half.is_there(tmp_path):
                time.sleep(0.02)
            if how == "cancelled":
                assert client.batches.cancel(batch.id).status == "cancelling"
            else:
                server.now += 24 * 3600 + 1
            done = ended(client, batch.id)
        assert done.status == how
        answered = [line["custom_id"] for line in told(client, done.output_file_id)]
        unanswered = told(client, done.error_file_id)
        assert answered == [f"row-{number}" for number in range(5)]
        assert [line["custom_id"] for line in unanswered] == [f"row-{number}" for number in range(5, 12)]
        assert {line["error"]["code"] for line in unanswered} == {f"batch_{how}"}
        assert done.request_counts is not None
        assert done.request_counts.to_dict() == {"total": 12, "completed": 5, "failed": 7}

    def test_a_killed_run_is_started_again(self, server: Server) -> None:
        begun: list[type[ByStages]] = []

        def start(job: bytes) -> ByStages:
            begun.append(ByStages if begun else Killed)
            return begun[-1](job)

        server.start = start
        client = server.client()
        batch = created(client, lines(12, max_tokens=8))
        with server.working():
            done = ended(client, batch.id)
        assert (done.status, begun) == ("completed", [Killed, ByStages])
        assert len(told(client, done.output_file_id)) == 12

    def test_one_that_is_killed_again_and_again_is_given_up(self, server: Server) -> None:
        begun: list[bytes] = []

        class Dead:
            def __init__(self, job: bytes) -> None:
                begun.append(job)

            def is_on(self) -> bool:
                return False

            def end(self) -> None:
                pass

            def result(self) -> tuple[int, str]:
                return -9, ""

        server.start = Dead
        client = server.client()
        batch = created(client, lines(3, max_tokens=8))
        with server.working():
            done = ended(client, batch.id)
        assert (done.status, done.output_file_id, len(begun)) == ("failed", None, 6)
        assert len(told(client, done.error_file_id)) == 3

    def test_what_a_failed_run_has_answered_is_given(self, server: Server) -> None:
        server.start = Broken
        client = server.client()
        batch = created(client, lines(12, max_tokens=8))
        with server.working():
            done = ended(client, batch.id)
        assert done.status == "failed"
        assert [line["custom_id"] for line in told(client, done.output_file_id)] == [
            f"row-{number}" for number in range(5)
        ]
        assert {line["error"]["code"] for line in told(client, done.error_file_id)} == {"batch_failed"}
        assert "/some/path" not in done.to_json()
        assert str(server.folder) not in done.to_json()

    def test_a_fault_while_counting_is_nothing_to_a_run(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun: list[ByStages] = []

        def start(job: bytes) -> ByStages:
            begun.append(ByStages(job))
            return begun[-1]

        def away(*_: object) -> None:
            raise TransientStorageError("the store is away")

        server.start = start
        monkeypatch.setattr(batch_worker, "fold", away)
        client = server.client()
        batch = created(client, lines(6, max_tokens=8))
        with server.working():
            assert ended(client, batch.id).status == "completed"
        assert len(begun) == 1

    @pytest.mark.parametrize("fault", [StorageError, StorageFull, TransientStorageError])
    def test_a_store_that_fails_is_waited_for(
        self, server: Server, monkeypatch: pytest.MonkeyPatch, fault: type[Exception]
    ) -> None:
        """Whatever is written: the job, the batch's record, a result's."""
        monkeypatch.setattr(batch_worker, "_RETRY_S", 0.01)
        client = server.client()
        batch = created(client, lines(6, max_tokens=8))
        server.store.storage = Flaky(server.store.storage.root, fault)
        with server.working():
            done = ended(client, batch.id)
        assert done.status == "completed"
        assert len(told(client, done.output_file_id)) == 6
        assert len(list(client.files.list(purpose="batch_output"))) == 1

    def test_windows_of_those_behind_are_kept(self, server: Server, tmp_path: Path) -> None:
        client = server.client()
        server.start = Half
        created(client, lines(12, max_tokens=8))
        behind = client.post(
            "/batches",
            body={
                "input_file_id": uploaded(client, lines(1)),
                "endpoint": "/v1/chat/completions",
                "completion_window": "1h",
            },
            cast_to=Batch,
        )
        with server.working():
            while not Half.is_there(tmp_path):
                time.sleep(0.02)
            server.now += 3601
            assert ended(client, behind.id).status == "expired"

    def test_a_cancel_that_was_told_holds(self, server: Server) -> None:
        client = server.client()
        batch = created(client, lines(6, max_tokens=8))

        class Late(ByStages):
            def result(self) -> tuple[int, str]:
                done = super().result()
                assert client.batches.cancel(batch.id).status == "cancelling"
                return done

        server.start = Late
        with server.working():
            done = ended(client, batch.id)
        assert done.status == "cancelled"
        assert len(told(client, done.output_file_id)) == 6

    def test_one_that_waits_is_cancelled_at_once(self, server: Server) -> None:
        client = server.client()
        batch = created(client, lines(1))
        assert client.batches.cancel(batch.id).status == "cancelled"
        with pytest.raises(openai.BadRequestError):
            client.batches.cancel(batch.id)
        assert server.store.waiting() == []

    def test_lists_are_paged_the_latest_first(self, server: Server) -> None:
        client = server.client()
        file = uploaded(client, lines(1))
        made = [
            client.batches.create(
                input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h"
            ).id
            for _ in range(5)
        ]
        assert [batch.id for batch in client.batches.list(limit=2)] == made[::-1]  # the client asks on
        assert len(client.batches.list(limit=2).data) == 2
        first = uploaded(client, lines(1))
        assert [file.id for file in client.files.list(order="asc", limit=1)] == [file, first]

    def test_a_large_body_is_no_batch(self, server: Server) -> None:
        answer = TestClient(server.app).post("/v1/batches", content=b"[" * 100_000)
        assert answer.status_code == 413


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


class TestFiles:
    def test_a_file_comes_back_as_it_went(self, server: Server) -> None:
        client = server.client()
        data = lines(3)
        id_ = uploaded(client, data)
        assert client.files.content(id_).content == data
        assert client.files.retrieve(id_).bytes == len(data)
        assert [file.id for file in client.files.list()] == [id_]
        client.files.delete(id_)
        with pytest.raises(openai.NotFoundError):
            client.files.content(id_)
        assert list(Server(server.folder).client().files.list()) == []

    def test_one_that_a_batch_waits_to_read_stays(self, server: Server) -> None:
        client = server.client()
        batch = created(client, lines(1))
        with pytest.raises(openai.BadRequestError, match=batch.id):
            client.files.delete(batch.input_file_id)

    def test_one_that_is_too_large_is_refused(self, tmp_path: Path) -> None:
        server = Server(tmp_path, max_file_bytes=1000)
        with pytest.raises(openai.APIStatusError, match="larger than") as refused:
            uploaded(server.client(), b"x" * 100_000)
        assert refused.value.status_code == 413
        assert server.store.files("anonymous") == []

    @pytest.mark.parametrize(("data", "purpose"), [(b"", "batch"), (b"{}", "fine-tune")])
    def test_what_is_no_batch_file_is_refused(self, server: Server, data: bytes, purpose: Any) -> None:
        with pytest.raises(openai.BadRequestError):
            server.client().files.create(file=("x.jsonl", data), purpose=purpose)


class TestKeys:
    def test_each_key_has_its_own(self, tmp_path: Path) -> None:
        server = Server(tmp_path, keyed=True)
        ann, bob = (server.client(server.keys[name]) for name in ("ann", "bob"))
        batch = created(ann, lines(1))
        with pytest.raises(openai.NotFoundError):
            bob.batches.retrieve(batch.id)
        with pytest.raises(openai.NotFoundError):
            bob.batches.cancel(batch.id)
        with pytest.raises(openai.NotFoundError):
            bob.files.content(batch.input_file_id)
        with pytest.raises(openai.NotFoundError):
            bob.files.delete(batch.input_file_id)
        with pytest.raises(openai.NotFoundError):
            bob.batches.create(
                input_file_id=batch.input_file_id, endpoint="/v1/chat/completions", completion_window="24h"
            )
        assert [*bob.batches.list(), *bob.files.list()] == []

    @pytest.mark.parametrize(
        "path",
        ["/v1/models", "/v1/models/tiny", "/v1/files", "/v1/files/x/content", "/v1/batches", "/v1/batches/x"],
    )
    @pytest.mark.parametrize(
        "header", [{}, {"authorization": "Bearer dray-guess"}, {"authorization": "Basic YQ=="}]
    )
    def test_nothing_is_told_without_a_key(self, tmp_path: Path, path: str, header: dict[str, str]) -> None:
        server = Server(tmp_path, keyed=True)
        answer = TestClient(server.app).get(path, headers=header)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"

    def test_nothing_is_taken_without_a_key(self, tmp_path: Path) -> None:
        server = Server(tmp_path, keyed=True)
        client = server.client("guess")
        for call in (
            lambda: uploaded(client, lines(1)),
            lambda: client.batches.create(
                input_file_id="x", endpoint="/v1/completions", completion_window="24h"
            ),
            lambda: client.batches.cancel("x"),
            lambda: client.files.delete("x"),
        ):
            with pytest.raises(openai.AuthenticationError):
                call()
        assert {line["key"] for line in server.lines} == {None}

    def test_a_key_ends_with_its_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(api_keys, "_LOOK_S", 0.0)
        server = Server(tmp_path, keyed=True)
        ann, bob = (server.client(server.keys[name]) for name in ("ann", "bob"))
        _, of_bob = server.key_file.read_text().splitlines()
        server.key_file.write_text(f"ann sha256:typo\n{of_bob}\n")  # one bad line costs no other
        assert list(bob.models.list())
        with pytest.raises(openai.AuthenticationError):
            ann.models.list()
        server.key_file.unlink()
        with pytest.raises(openai.AuthenticationError):
            bob.models.list()

    def test_a_file_of_keys_has_each_name_once(self, tmp_path: Path) -> None:
        path = str(tmp_path / "keys.txt")
        key = new_key("ann", path)
        assert ApiKeys(path).owner(key) == "ann"
        for name in ("ann", "anonymous", "a b"):
            with pytest.raises(SpecError):
                new_key(name, path)
        (tmp_path / "keys.txt").write_text("ann secret\n")
        with pytest.raises(SpecError, match="line 1"):
            ApiKeys(path)


class TestHttp:
    def test_every_request_is_logged(self, tmp_path: Path) -> None:
        server = Server(tmp_path, keyed=True)
        client = server.client(server.keys["ann"])
        data = lines(3)
        uploaded(client, data)
        with pytest.raises(openai.NotFoundError):
            client.batches.retrieve("batch_x")
        upload, missing = server.lines
        assert (upload["key"], upload["method"], upload["path"], upload["status"]) == (
            "ann",
            "POST",
            "/v1/files",
            200,
        )
        assert upload["bytes_in"] > len(data)
        assert (missing["path"], missing["status"]) == ("/v1/batches/batch_x", 404)
        assert server.keys["ann"] not in server.log.getvalue()
        answer = TestClient(server.app).get("/health")
        assert answer.headers["x-request-id"] == server.lines[-1]["request_id"]

    def test_metrics_count_requests_by_route(self, server: Server) -> None:
        client = TestClient(server.app)
        for id_ in ("a", "b"):
            client.get(f"/v1/batches/{id_}")
        client.get("/nowhere/at/all")
        created(server.client(), lines(1))
        text = client.get("/metrics").text
        assert 'dray_api_requests_total{method="GET",route="/v1/batches/{id}",status="404"} 2.0' in text
        assert 'route="none",status="404"} 1.0' in text
        assert "dray_api_batches_open 1.0" in text

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"endpoint": "/v1/images", "completion_window": "24h"}, "endpoint"),
            ({"endpoint": "/v1/completions", "completion_window": "soon"}, "completion_window"),
            ({"completion_window": "24h"}, "endpoint"),
            ({"endpoint": "/v1/completions", "completion_window": "9" * 400 + "h"}, "completion_window"),
            (
                {"endpoint": "/v1/completions", "completion_window": "24h", "output_expires_after": {}},
                "output_expires_after",
            ),
        ],
    )
    def test_a_batch_that_cannot_be_is_refused(
        self, server: Server, body: dict[str, Any], param: str
    ) -> None:
        file = uploaded(server.client(), lines(1))
        answer = TestClient(server.app).post("/v1/batches", json={"input_file_id": file, **body})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)

    def test_models_are_listed(self, server: Server) -> None:
        assert [model.id for model in server.client().models.list()] == [MODEL]
        with pytest.raises(openai.NotFoundError):
            server.client().models.retrieve("gpt-9")
