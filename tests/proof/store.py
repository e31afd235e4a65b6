"""Stores in memory under a schedule: the product's own S3 and fsspec backends, with a simulated server below them.

Every request takes its time before and after its effect, so that others come in between; answers to writes may be lost.
The server remembers each effect with who had it: the protocol is judged by that, not by what clients believe.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, Literal

from botocore.exceptions import ClientError

from pipelines.errors import TransientStorageError
from pipelines.storage_backend import Backend
from pipelines.storage_other import OtherBackend
from pipelines.storage_s3 import S3Backend
from tests.proof.schedule import Process, Schedule

Kind = Literal["s3", "s3, answers lost", "s3, no conditions", "fsspec"]
#: Seconds that a request takes at most, before its effect and again after it.
SLOWEST_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One object."""

    data: bytes
    version: str
    metadata: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One change of the store."""

    at: float
    process: Process | None
    key: str
    before: bytes | None
    after: bytes | None
    """None: deleted."""
    conditional: bool
    """The server itself held it against the object's version."""
    blind: bool
    """Without conditions: the object changed between the client's look and its write (`storage_other`'s window)."""


class Server:
    """The objects of one store, by key."""

    def __init__(self, schedule: Schedule, kind: Kind) -> None:
        self.schedule, self.kind = schedule, kind
        self.conditions = kind in ("s3", "s3, answers lost")
        self.loss = 0.05
        """Share of writes whose answer is lost."""
        self.slow = schedule.random.choice((0.02, 0.1, 0.4))
        """Share of requests that take up to SLOWEST_S; the others take up to 50 ms."""
        self.is_aws = schedule.random.random() < 0.5
        self.objects: dict[str, Stored] = {}
        self.effects: list[Effect] = []
        self.at_request: dict[tuple[Process | None, int], Callable[[], None]] = {}
        """What happens to a process when it makes its n-th request."""
        self._requests: Counter[Process | None] = Counter()
        self.judges: list[Callable[[Effect], None]] = []
        self._seen: dict[tuple[int, str], str | None] = {}

    def backend(self) -> Backend:
        """For one `Storage`."""
        return SimulatedFsspec(self) if self.kind == "fsspec" else SimulatedS3(self)

    def pause(self) -> None:
        process = self.schedule.process
        self._requests[process] += 1
        if accident := self.at_request.get((process, self._requests[process])):
            accident()
        random = self.schedule.random
        self.schedule.sleep(random.uniform(0.001, SLOWEST_S if random.random() < self.slow else 0.05))

    def answer_is_lost(self) -> bool:
        return self.schedule.random.random() < self.loss

    def look(self, key: str) -> Stored | None:
        found = self.objects.get(key)
        self._seen[id(self.schedule._current), key] = found.version if found else None
        return found

    def put(
        self, key: str, data: bytes, metadata: Mapping[str, str], if_match: str = "", if_none: bool = False
    ) -> None:
        """Raises ClientError (404, 412) when a condition does not hold."""
        there = self.objects.get(key)
        if if_match and there is None:
            raise refused("NoSuchKey", 404)
        if (if_none and there) or (if_match and there and there.version != if_match):
            raise refused("PreconditionFailed", 412)
        self._change(key, data, metadata, conditional=bool(if_match or if_none))

    def delete(self, key: str, if_match: str = "") -> None:
        there = self.objects.get(key)
        if there is None:
            return
        if if_match and there.version != if_match:
            raise refused("PreconditionFailed", 412)
        self._change(key, None, {}, conditional=bool(if_match))

    def _change(
        self, key: str, data: bytes | None, metadata: Mapping[str, str], *, conditional: bool
    ) -> None:
        there = self.objects.get(key)
        seen = self._seen.get((id(self.schedule._current), key), "never looked")
        effect = Effect(
            at=self.schedule.now,
            process=self.schedule.process,
            key=key,
            before=there.data if there else None,
            after=data,
            conditional=conditional,
            blind=not self.conditions and seen != (there.version if there else None),
        )
        if data is None:
            del self.objects[key]
        else:
            # S3's ETag: equal content has an equal version, also after a change and back.
            self.objects[key] = Stored(
                data=data, version=hashlib.md5(data).hexdigest(), metadata=dict(metadata)
            )
        self.effects.append(effect)
        self.schedule.note(f"{'DELETE' if data is None else 'PUT'} {key}{' (blind)' if effect.blind else ''}")
        for judge in self.judges:
            judge(effect)


def refused(code: str, status: int) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "request")


class SimulatedS3(S3Backend):
    """The product's S3 backend; only its requests are answered by `Server`."""

    def __init__(self, server: Server) -> None:
        super().__init__({}, 60.0)
        self._server = server

    def _connection(self) -> Any:
        return SimpleNamespace(is_aws=self._server.is_aws and self._server.conditions)

    def _ask(self, method: str, url: str, size: int = 0, /, **arguments: Any) -> Any:
        server = self._server
        while True:
            server.pause()
            result = getattr(self, f"_{method}")(**arguments)
            if method not in ("put_object", "delete_object") or not server.answer_is_lost():
                server.pause()
                return result
            server.schedule.note(f"the answer to {method} {url} is lost")
            if server.kind != "s3":
                raise TransientStorageError(f"{url}: the answer was lost")
            server.schedule.sleep(
                server.schedule.random.uniform(0.0, 0.4)
            )  # and asked again, as `persist` does

    def _get(self, path: str, more: dict[str, Any]) -> tuple[bytes, str]:
        self._server.pause()
        there = self._server.look(path)
        if there is None:
            raise FileNotFoundError(path)
        if more.get("IfMatch", f'"{there.version}"') != f'"{there.version}"':
            raise refused("PreconditionFailed", 412)
        data = there.data
        if "Range" in more:
            start, stop = map(int, more["Range"].removeprefix("bytes=").split("-"))
            if start >= len(data):
                raise refused("InvalidRange", 416)
            data = data[start : stop + 1]
        return data, there.version

    def _head_object(self, Bucket: str, Key: str) -> dict[str, Any]:  # noqa: N803 - the API's names
        there = self._server.look(f"{Bucket}/{Key}")
        if there is None:
            raise FileNotFoundError(Key)
        return described(there) | {"ContentLength": len(there.data), "Metadata": there.metadata}

    def _put_object(self, Bucket: str, Key: str, Body: bytes, Metadata: Any, **given: str) -> None:  # noqa: N803
        conditions = given if self._server.conditions else {}
        self._server.put(
            f"{Bucket}/{Key}",
            Body,
            Metadata,
            if_match=conditions.get("IfMatch", "").strip('"'),
            if_none="IfNoneMatch" in conditions,
        )

    def _delete_object(self, Bucket: str, Key: str, IfMatch: str = "") -> None:  # noqa: N803
        self._server.delete(f"{Bucket}/{Key}", IfMatch.strip('"') if self._server.conditions else "")

    def _list_objects_v2(self, Bucket: str, Prefix: str) -> dict[str, Any]:  # noqa: N803
        return {
            "Contents": [
                {"Key": key.removeprefix(f"{Bucket}/"), "Size": len(there.data), **described(there)}
                for key, there in self._server.objects.items()
                if key.startswith(f"{Bucket}/{Prefix}")
            ]
        }


def described(there: Stored) -> dict[str, Any]:
    return {"ETag": f'"{there.version}"', "LastModified": datetime.fromtimestamp(0, UTC)}


class SimulatedFsspec(OtherBackend):
    """The product's backend for any fsspec file system, over one that `Server` plays."""

    def __init__(self, server: Server) -> None:
        super().__init__("sim", {}, 0.0)
        self._system = FileSystem(server)

    def _fs(self) -> Any:
        return self._system


class FileSystem:
    """What `OtherBackend` asks of fsspec."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def invalidate_cache(self) -> None:
        pass

    def _strip_protocol(self, path: str) -> str:
        return path

    def info(self, path: str) -> dict[str, Any]:
        self._server.pause()
        there = self._server.look(path)
        if there is None:
            raise FileNotFoundError(path)
        return {"type": "file", "size": len(there.data), "etag": there.version}

    def find(self, folder: str, detail: bool) -> dict[str, Any]:
        self._server.pause()
        return {
            key: {"type": "file", "size": len(there.data), "etag": there.version}
            for key, there in self._server.objects.items()
            if key.startswith(f"{folder}/")
        }

    def cat_file(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        self._server.pause()
        there = self._server.objects.get(path)
        if there is None:
            raise FileNotFoundError(path)
        return there.data[start:end]

    def pipe_file(self, path: str, data: bytes) -> None:
        self._write(path, lambda: self._server.put(path, data, {}))

    def rm_file(self, path: str) -> None:
        self._write(path, lambda: self._server.delete(path))

    def _write(self, path: str, effect: Callable[[], None]) -> None:
        self._server.pause()
        effect()
        if self._server.answer_is_lost():
            self._server.schedule.note(f"the answer for {path} is lost")
            raise TransientStorageError(f"{path}: the answer was lost")
        self._server.pause()
