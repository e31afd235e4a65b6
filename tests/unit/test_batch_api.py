"""The batch API over HTTP as OpenAI's own client sees it: files, keys, lists, what is logged and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from jobs import api_keys
from jobs.api_keys import ApiKeys, new_key
from pipelines.errors import SpecError
from tests.unit.batch_serving import (
    MODEL,
    Server,
    created,
    lines,
    uploaded,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


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

    def test_a_large_body_is_no_batch(self, server: Server) -> None:
        answer = TestClient(server.app).post("/v1/batches", content=b"[" * 100_000)
        assert answer.status_code == 413
