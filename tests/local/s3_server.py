"""S3 servers for tests, as subprocesses on 127.0.0.1: moto (conditional writes) and rclone (refuses wrong keys).

    with moto() as server:
        bucket = server.new_bucket()
        Storage(f"s3://{bucket}/out", server.storage_options)

moto checks a condition and stores the object in two steps, on several threads: with 3 MB objects and 8 writers one
round in 30 had not exactly one winner. Real S3 is atomic, so `python -m tests.local.s3_server PORT` serves moto's own
application with one lock around writes (no such round then).
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import s3fs

ROOT = Path(__file__).resolve().parents[2]
KEY, SECRET = "dray-test-key", "dray-test-secret"


@dataclass(frozen=True)
class S3Server:
    """A running server, and how to speak to it."""

    endpoint_url: str
    pid: int
    key: str = KEY
    secret: str = SECRET
    bucket: str = ""
    """The fixture's fresh bucket; empty on a bare server."""

    @property
    def storage_options(self) -> dict[str, Any]:
        return {"endpoint_url": self.endpoint_url, "key": self.key, "secret": self.secret}

    @property
    def env(self) -> dict[str, str]:
        """The same as AWS variables, for subprocesses and job files without storage_options."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": "us-east-1",
        }

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    def new_bucket(self) -> str:
        """Makes a bucket of a fresh name."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        s3fs.S3FileSystem(**self.storage_options).mkdir(name)
        return name


@contextlib.contextmanager
def moto() -> Iterator[S3Server]:
    """moto with atomic conditional writes; accepts any key."""
    port = free_port()
    with _process([sys.executable, "-m", "tests.local.s3_server", str(port)], port) as pid:
        yield S3Server(f"http://127.0.0.1:{port}", pid)


@contextlib.contextmanager
def rclone(folder: Path | None = None) -> Iterator[S3Server]:
    """rclone over a local folder (its sub-folders are the buckets); 403 for a wrong key, ignores conditions."""
    port = free_port()
    with tempfile.TemporaryDirectory() as scratch:
        command = [str(Path(sys.executable).parent / "rclone"), "serve", "s3", str(folder or scratch)]
        command += ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}"]
        command += ["--config", "", "--vfs-cache-mode", "off"]
        with _process(command, port) as pid:
            yield S3Server(f"http://127.0.0.1:{port}", pid)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _process(command: list[str], port: int, ready_s: float = 60.0) -> Iterator[int]:
    """Runs `command` until the block ends; yields its pid once the port answers."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + ready_s
            while not _listens(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{command} did not start:\n{log.read().decode()}")
                time.sleep(0.05)
            yield process.pid
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclass
class _Atomic:
    """WSGI: reads the request's body first, then lets one write at a time into moto.

    Drops moto's Server header: werkzeug sends its own, and aiohttp under `python -X dev` refuses two.
    """

    application: Any
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            return start_response(status, [h for h in headers if h[0].lower() != "server"], exc_info)

        if environ["REQUEST_METHOD"] in ("GET", "OPTIONS"):
            return self.application(environ, start)
        if length := int(environ.get("CONTENT_LENGTH") or 0):
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
        with self.lock:
            return self.application(environ, start)


def _serve_moto(port: int) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    os.environ.setdefault("MOTO_ALLOW_NONEXISTENT_REGION", "true")
    application = _Atomic(DomainDispatcherApplication(create_backend_app))
    run_simple("127.0.0.1", port, application, threaded=True, use_reloader=False)


if __name__ == "__main__":
    _serve_moto(int(sys.argv[1]))
