"""What becomes of batches, as OpenAI's own client sees it, whatever happens to their runs, their store and their server."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch
from openai.types.chat import ChatCompletion

from jobs import batch_worker
from jobs.served_models import served_models
from pipelines.errors import SpecError, StorageError, StorageFull, TransientStorageError
from tests.local.runs import TINY
from tests.unit.batch_serving import (
    Broken,
    ByStages,
    Flaky,
    Half,
    Killed,
    Server,
    created,
    ended,
    lines,
    told,
    uploaded,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


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
