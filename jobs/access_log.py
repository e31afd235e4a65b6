"""Who asked what of the batch API, and how it went: a JSON line for each request, and the same as Prometheus metrics.

    {"at": "2026-11-30T03:50:01.123+00:00", "request_id": "req_…", "client": "127.0.0.1", "key": "analytics", "method": "POST",
     "path": "/v1/files", "status": 200, "ms": 12.4, "bytes_in": 52311, "bytes_out": 231}

`key` is the name of the key, never the key.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass(slots=True)
class Told:
    """What a line tells of one request, as it goes on."""

    request_id: str
    status: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


class AccessLog:
    """Lines and metrics."""

    def __init__(self, sink: IO[str], queued: Callable[[], int]) -> None:
        """`queued`: how many batches have not ended."""
        self._sink, self._lock = sink, threading.Lock()
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "dray_api_requests", "Requests answered.", ["method", "route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "dray_api_request_seconds", "Seconds to answer one.", ["route"], registry=self._registry
        )
        batches = Gauge("dray_api_batches_open", "Batches that have not ended.", registry=self._registry)
        batches.set_function(queued)

    def metrics(self, request: Request) -> Response:
        """The endpoint that Prometheus scrapes."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    def answered(self, scope: Scope, told: Told, seconds: float) -> None:
        """One request, after its last byte."""
        # A path that no route takes is whatever a client invents: as a label it would grow without end.
        route = getattr(scope.get("route"), "path", "none")
        self._requests.labels(scope["method"], route, told.status).inc()
        self._seconds.labels(route).observe(seconds)
        line = {
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": told.request_id,
            "client": (scope.get("client") or ("",))[0],
            "key": scope.get("owner"),
            "method": scope["method"],
            "path": scope["path"],
            "status": told.status,
            "ms": round(1000 * seconds, 1),
            "bytes_in": told.bytes_in,
            "bytes_out": told.bytes_out,
        }
        with self._lock:
            self._sink.write(json.dumps(line) + "\n")
            self._sink.flush()


class Measured:
    """ASGI middleware: logs each request, names it in `x-request-id`, and takes no more bytes of a body than `max_body`."""

    def __init__(self, app: ASGIApp, log: AccessLog, max_body: int) -> None:
        self._app, self._log, self._max_body = app, log, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        told = Told(f"req_{secrets.token_hex(12)}")

        async def receiving() -> Message:
            message = await receive()
            told.bytes_in += len(message.get("body", b""))
            if told.bytes_in > self._max_body:
                raise BodyTooLarge
            return message

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                told.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", told.request_id.encode())]
            told.bytes_out += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receiving, sending)
        finally:
            self._log.answered(scope, told, time.monotonic() - began)


class BodyTooLarge(Exception):
    """A body of more bytes than are taken."""
