"""An HTTP proxy in front of a storage server that misbehaves on request.

with FaultProxy(server.endpoint_url) as proxy:
    proxy.fail("slow_down", times=3, method="PUT")
    Storage(url, {**server.storage_options, "endpoint_url": proxy.url}).create(…)
    assert proxy.count("PUT") == 4

    proxy.storm("slow_down", random.Random(7), share=0.5)   # and half of all requests, until
    proxy.calm()
"""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

Fault = Literal[
    "slow_down",
    "deny",
    "error_500",
    "conflict",
    "reset_before",
    "reset_within",
    "reset_after",
    "cut",
    "stall",
    "swallow",
]
_STALL_S = 3.0
_SWALLOW_S = 8.0


@dataclass
class _Rule:
    fault: Fault
    method: str
    query: str
    times: float
    dice: random.Random | None = None
    share: float = 1.0

    def hits(self, method: str, path: str) -> bool:
        if not self.times or self.method not in ("", method) or self.query not in path:
            return False
        return self.dice is None or self.dice.random() < self.share


@dataclass
class FaultProxy:
    """Forwards to `target`, except for the requests that a rule of `fail` hits."""

    target: str
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """Method, path with query, and headers (lower case) of every request, in order of arrival."""
    struck: int = 0
    """Requests that met a fault."""
    _rules: list[_Rule] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    open_sockets: set[socket.socket] = field(default_factory=set)

    def fail(self, fault: Fault, times: int = 1, method: str = "", query: str = "") -> None:
        """The next `times` requests of `method` whose path and query contain `query` meet `fault`:

        - slow_down, deny, error_500, conflict: an S3 error (503, 403, 500, 409) without asking the server
        - reset_before, reset_after: the connection is reset before, or after, the server has done its work
        - reset_within: half of the request's body is read, and the connection is reset
        - cut: half of the answer's body, then the end of the connection
        - stall: the server's answer comes 3 s late
        - swallow: the request's body is not read, and after 8 s the connection is reset
        """
        self._rules.append(_Rule(fault, method, query, times))

    def storm(
        self, fault: Fault, dice: random.Random, share: float = 1.0, method: str = "", query: str = ""
    ) -> None:
        """Until `calm`, such requests meet `fault` with the probability `share`, drawn from `dice`."""
        self._rules.append(_Rule(fault, method, query, float("inf"), dice, share))

    def calm(self) -> None:
        """No more faults."""
        with self._lock:
            self._rules.clear()

    def count(self, method: str, query: str = "") -> int:
        return sum(1 for m, path, _ in self.requests if m == method and query in path)

    def next_fault(self, method: str, path: str, headers: dict[str, str]) -> Fault | None:
        with self._lock:
            self.requests.append((method, path, headers))
            for rule in self._rules:
                if rule.hits(method, path):
                    rule.times -= 1
                    self.struck += 1
                    return rule.fault
        return None

    def __enter__(self) -> FaultProxy:
        proxy = self

        class Handler(_Handler):
            faults = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        for client in list(self.open_sockets):  # kept alive: their threads would go on serving
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: FaultProxy

    def _serve(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        fault = self.faults.next_fault(self.command, self.path, headers)
        if fault == "swallow":
            time.sleep(_SWALLOW_S)
            return self._reset()
        length_in = int(headers.get("content-length", 0))
        if fault == "reset_within":
            self.rfile.read(length_in // 2)
            return self._reset()
        body = self.rfile.read(length_in)
        if fault == "slow_down":
            return self._refuse(503, "SlowDown")
        if fault == "deny":
            return self._refuse(403, "AccessDenied")
        if fault == "error_500":
            return self._refuse(500, "InternalError")
        if fault == "conflict":
            return self._refuse(409, "ConditionalRequestConflict")
        if fault == "reset_before":
            return self._reset()
        if fault == "stall":
            time.sleep(_STALL_S)
        target = urlsplit(self.faults.target)
        connection = http.client.HTTPConnection(str(target.hostname), target.port, timeout=30)
        try:
            connection.request(self.command, self.path, body or None, dict(self.headers.items()))
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if fault == "reset_after":
            return self._reset()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("content-length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if fault == "cut":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            return self._reset()
        self.wfile.write(content)
        return None

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815 (the names that http.server calls)

    def _refuse(self, status: int, code: str) -> None:
        text = f"<Error><Code>{code}</Code><Message>made by the proxy</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _reset(self) -> None:
        """RST instead of FIN: the client sees `connection reset by peer`."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # reset on purpose
            super().finish()

    def handle(self) -> None:
        self.faults.open_sockets.add(self.connection)
        with contextlib.suppress(OSError, ValueError):  # the client has given up, or we have hung up
            super().handle()
        self.faults.open_sockets.discard(self.connection)

    def log_message(self, format: str, *args: Any) -> None:
        pass
