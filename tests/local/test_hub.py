"""An output put on a hub that speaks the Hugging Face hub's protocol: what a reader finds there, before and after."""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.local.runs import ROOT, job, rows_of, write_questions
from tests.unit.stages import Output, committed

REPO = "acme/answers"
TOKEN = "hf_writes"


class Hub:
    """Datasets as the hub keeps them: small files in commits, Parquet by its digest (LFS)."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.url = ""

    def create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        if name in self.repos:
            return 409, {"error": "exists", "url": f"{self.url}/datasets/{name}"}
        self.repos[name], self.private[name] = (
            {},
            bool(asked.get("private") or asked.get("visibility") == "private"),
        )
        return 200, {"url": f"{self.url}/datasets/{name}"}

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        files = dict(self.repos[repo])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return 400, {"error": line["key"]}
        self.repos[repo] = files
        oid = hashlib.sha1(str(len(self.commits)).encode()).hexdigest()
        return 200, {
            "commitUrl": f"{self.url}/datasets/{repo}/commit/{oid}",
            "commitOid": oid,
            "success": True,
        }

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if method == "PUT":
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        repo = next((name for name in self.repos if f"/{name}" in path), None)
        if repo is None:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            modes = {True: "lfs", False: "regular"}
            files = [
                {
                    "path": file["path"],
                    "uploadMode": modes[file["path"].endswith(".parquet")],
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if "/info/lfs/objects/batch" in path:
            objects = json.loads(body)["objects"]
            links = [{**o, "actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}}} for o in objects]
            return 200, {"transfer": "basic", "objects": links}
        if "/commit/" in path:
            return self.commit(repo, [json.loads(line) for line in body.splitlines()])
        if "/tree/" in path:
            return 200, [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.repos[repo].items()
            ]
        return 200, {
            "id": repo,
            "sha": "0" * 40,
            "siblings": [{"rfilename": name} for name in self.repos[repo]],
        }


@pytest.fixture
def hub() -> Iterator[Hub]:
    store = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self._body()
            if self.command != "PUT" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, given = 401, {"error": "Invalid credentials"}
            else:
                status, given = store.answer(self.command, self.path.partition("?")[0], body)
            data = json.dumps(given).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815 - as http.server names them

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    store.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield store
    server.shutdown()
    server.server_close()


def export(hub: Hub, output: Output, *more: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """As a user calls it: the library reads its endpoint once, when it is imported."""
    env = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-m", "jobs.cli", "export", "hub", str(output.folder), *more]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


def answered(folder: Path, name: str = "out", rows: int = 40) -> Output:
    write_questions(folder / f"in-{name}", rows=rows)
    output = committed(job(folder / f"in-{name}", folder / name, shards={"rows": 15}))
    output.storage.write("data/_SUCCESS", b"{}")
    return output


def dataset(hub: Hub, repo: str = REPO) -> pa.Table:
    files = {name: data for name, data in hub.repos[repo].items() if name.startswith("data/")}
    return pa.concat_tables([pq.read_table(io.BytesIO(files[name])) for name in sorted(files)])


def by_id(rows: pa.Table) -> list[dict[str, Any]]:
    return sorted(rows.to_pylist(), key=lambda row: row["row_id"])


def test_a_dataset_is_one_commit_and_the_next_takes_its_place(tmp_path: Path, hub: Hub) -> None:
    first = answered(tmp_path)
    done = export(
        hub, first, REPO, "--private", "--file-size", "1KB", "--split", "train=0.8", "--split", "test=0.2"
    )
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/datasets/{REPO}/commit/" in done.stdout
    assert hub.private == {REPO: True}
    assert len(hub.commits) == 1
    assert {name.partition("-")[0] for name in hub.repos[REPO]} == {"README.md", "data/train", "data/test"}
    there = dataset(hub)
    assert by_id(there) == by_id(rows_of(first.folder).select(there.column_names))
    assert b"configs:" in hub.repos[REPO]["README.md"]

    smaller = answered(tmp_path, "smaller", rows=5)
    assert export(hub, smaller, REPO).returncode == 0
    assert len(hub.commits) == 2
    assert sorted(hub.repos[REPO]) == [
        "README.md",
        "data/train-00000.parquet",
    ]  # nothing of the first is left
    assert len(dataset(hub)) == 5


@pytest.mark.parametrize(
    ("arguments", "token", "words"),
    [
        ((REPO,), "hf_reads", "set HF_TOKEN to one that may"),
        (("no/such/name",), TOKEN, "write OWNER/NAME"),
    ],
)
def test_what_the_hub_refuses_is_said(
    tmp_path: Path, hub: Hub, arguments: tuple[str, ...], token: str, words: str
) -> None:
    done = export(hub, answered(tmp_path, rows=4), *arguments, token=token)
    assert done.returncode == 2, done.stdout
    assert words in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert not hub.commits


def test_a_hub_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    nowhere = Hub()
    nowhere.url = "http://127.0.0.1:9"
    done = export(nowhere, answered(tmp_path, rows=4), REPO)
    assert done.returncode == 2
    assert "http://127.0.0.1:9 cannot be reached" in done.stderr.replace("\n", " ")


def test_an_output_that_is_not_finished_is_not_pushed(tmp_path: Path, hub: Hub) -> None:
    output = answered(tmp_path, rows=4)
    output.storage.delete("data/_SUCCESS")
    assert "is not finished" in export(hub, output, REPO).stderr
    assert not hub.repos
