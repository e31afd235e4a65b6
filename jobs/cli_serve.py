"""`dray serve` and `dray keys new`."""

from __future__ import annotations

import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import IO, TYPE_CHECKING, Any

import click

from jobs.command import command, main, show, stderr
from pipelines.errors import Interrupted, SpecError

if TYPE_CHECKING:
    import uvicorn

    from jobs.batch_worker import BatchWorker


@main.group("keys")
def keys() -> None:
    """Make keys for those who may use `dray serve`."""


@command("new", keys)
@click.argument("name")
@click.argument("file", metavar="FILE")
def new(name: str, file: str, as_json: bool) -> None:
    """Make a key and show it, once: FILE gets its name and digest only. Taking the line out ends the key."""
    from jobs.api_keys import new_key

    key = new_key(name, file)
    show({"name": name, "key": key, "file": file}, key, as_json=as_json)


@command("serve")
@click.option(
    "-m",
    "--model",
    "models",
    multiple=True,
    required=True,
    metavar="[NAME=]JOB",
    help="A model to serve: a job file with its model, pool and cluster; NAME is what requests call it (default: model.source). Again for more.",
)
@click.option(
    "--store",
    required=True,
    metavar="FOLDER",
    help="Where files, batches and their outputs are kept; a path or URL.",
)
@click.option("--keys", "key_file", metavar="FILE", help="Who may ask: a file of `dray keys new`.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", default=8000, show_default=True, help="The port to listen on; 0: a free one.")
@click.option("--access-log", metavar="FILE", help="A JSON line for each request; default: stdout.")
@click.option(
    "--max-file-mb", default=200, show_default=True, type=click.IntRange(min=1), help="Largest upload."
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def serve(
    models: tuple[str, ...],
    store: str,
    key_file: str | None,
    host: str,
    port: int,
    access_log: str | None,
    max_file_mb: int,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Serve OpenAI's Batch API: files and batches, run one after the other as jobs of Dray.

    Ctrl-C or SIGTERM ends it and the run that goes on; the next start takes up what was not finished.
    """
    import uvicorn

    from jobs.access_log import AccessLog
    from jobs.api_keys import ApiKeys
    from jobs.batch_api import BatchApi
    from jobs.batch_store import BatchStore
    from jobs.batch_worker import BatchWorker
    from jobs.ledger import new_run_id
    from jobs.lock import OutputLock
    from jobs.served_models import served_models
    from pipelines.storage import Storage

    if key_file is None and host not in ("127.0.0.1", "::1", "localhost"):
        raise SpecError(
            f"--host {host} can be reached by others: give --keys FILE (`dray keys new NAME FILE`)"
        )
    who = ApiKeys(key_file) if key_file is not None else None
    served = served_models(models, overrides)
    storage = Storage(store)
    storage.check_writable()
    with _listening(host, port) as at, OutputLock(storage, new_run_id()) as lock, _opened(access_log) as sink:
        kept = BatchStore(storage)
        worker = BatchWorker(kept, served)
        api = BatchApi(kept, worker, who, max_file_bytes=max_file_mb * 1_000_000)
        app = api.app(AccessLog(sink, queued=lambda: len(kept.waiting())))
        server = uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="warning", lifespan="off"))
        with _Working(worker, lock.check, server):
            stderr.print(f"serving {', '.join(served)} at http://{host}:{at.getsockname()[1]}/v1")
            server.run(sockets=[at])


class _Working:
    """The worker in a thread: its end is the server's, and the other way round."""

    def __init__(self, worker: BatchWorker, check: Callable[[], None], server: uvicorn.Server) -> None:
        self._worker, self._check, self._server = worker, check, server
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="batches")

    def _run(self) -> None:
        try:
            self._worker.run(self._check)
        except BaseException as error:  # noqa: BLE001 - raised again where the server ends
            self._error = error
        finally:
            self._server.should_exit = True

    def __enter__(self) -> None:
        # uvicorn raises the signal that ended it once more for those who handled it before.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stopped)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._worker.stop()
        self._thread.join()
        if self._error is not None:
            raise self._error


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise SpecError(f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}") from None


def _opened(access_log: str | None) -> AbstractContextManager[IO[str]]:
    if access_log is None:
        return nullcontext(sys.stdout)
    try:
        return open(access_log, "a", encoding="utf-8")
    except OSError as error:
        raise SpecError(f"--access-log {access_log}: {error.strerror}") from None


def _stopped(number: int, frame: Any) -> None:
    raise Interrupted(f"stopped by {signal.Signals(number).name}; start it again to go on with the batches")
