"""The HTTP server and the worker of the batch API: a signal ends both, and the end of one is the other's."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from jobs.batch_worker import BatchWorker
from pipelines.errors import Interrupted, SpecError

#: Seconds that requests under way have when the server ends.
GRACE_S = 5


def listening(host: str, port: int) -> socket.socket:
    """A port of this server's own. Raises SpecError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise SpecError(f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}") from None


def serve(app: ASGIApp, at: socket.socket, worker: BatchWorker, check: Callable[[], None]) -> None:
    """Until SIGINT or SIGTERM: raises Interrupted then, and whatever ended the worker. `check`: see `BatchWorker.run`."""
    server = _Server(app, worker)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            worker.run(check)
        except BaseException as error:  # noqa: BLE001 -- raised again where the server ends
            failure.append(error)
        finally:
            server.should_exit = True

    # uvicorn raises the signal that ended it once more, for who handled it before.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stopped)
    thread = threading.Thread(target=work, name="batches")
    thread.start()
    try:
        server.run(sockets=[at])
    finally:
        worker.stop()
        thread.join()
        if failure:
            raise failure[0]


class _Server(uvicorn.Server):
    """Has the worker end its run at the signal: the requests under way are waited for only then."""

    def __init__(self, app: ASGIApp, worker: BatchWorker) -> None:
        config = uvicorn.Config(
            app, access_log=False, log_level="warning", lifespan="off", timeout_graceful_shutdown=GRACE_S
        )
        super().__init__(config)
        self._worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._worker.stop()
        super().handle_exit(sig, frame)


def _stopped(number: int, frame: FrameType | None) -> None:
    raise Interrupted(f"stopped by {signal.Signals(number).name}; start it again to go on with the batches")
