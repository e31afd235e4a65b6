"""Keys of the batch API: a file of names and digests, one of them a line; the keys themselves are nowhere.

    # dray keys new analytics keys.txt
    analytics  sha256:5e88…  2026-11-30

A key is 256 random bits, so that its plain SHA-256 tells nothing of it. The file is read again when it has changed: a line
that is taken out ends its key within seconds.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import threading
import time
from datetime import UTC, datetime

from pipelines.errors import DrayError, SpecError
from pipelines.storage import locate

#: Seconds between two looks at whether the file has changed.
_LOOK_S = 2.0
_log = logging.getLogger("dray")

_LINE = re.compile(r"(?P<name>[\w.@-]+)\s+sha256:(?P<digest>[0-9a-f]{64})(\s+\d{4}-\d\d-\d\d)?")
_NAME = re.compile(r"[\w.@-]+")


class ApiKeys:
    """Who a key belongs to; for many threads."""

    def __init__(self, path: str) -> None:
        """`path`: a local path or URL. Raises SpecError where it cannot be read as such a file."""
        self.path = path
        self._storage, self._file = locate(path)
        self._lock = threading.Lock()
        self._looked = time.monotonic()
        self._version = ""
        self._digests: dict[str, str] = {}
        self._read()

    def owner(self, key: str) -> str | None:
        """The name of the key; None for one that is not in the file. Compares in constant time."""
        given = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        with self._lock:
            self._look()
            found = [name for digest, name in self._digests.items() if hmac.compare_digest(digest, given)]
        return found[0] if found else None

    def _look(self) -> None:
        if time.monotonic() - self._looked < _LOOK_S:
            return
        self._looked = time.monotonic()
        try:
            self._read()
        except DrayError as error:  # half-way through an edit, or the store is away: those of before count
            _log.error("the keys of before still count: %s", error)

    def _read(self) -> None:
        try:
            version = self._storage.info(self._file).version
            if version != self._version:
                self._digests = _parse(self._storage.read(self._file), self.path)
                self._version = version
        except FileNotFoundError:
            raise SpecError(
                f"{self.path}: no such file; `dray keys new NAME {self.path}` makes one"
            ) from None


def new_key(name: str, path: str) -> str:
    """Add a key of this name to the file, which is made if need be; the key, which nothing else will ever tell.

    Raises SpecError where the name is taken or has other characters than letters, digits and `_.@-`.
    """
    if not _NAME.fullmatch(name):
        raise SpecError(f"{name!r}: a key's name has letters, digits and _ . @ - only")
    key = f"dray-{secrets.token_urlsafe(32)}"
    line = f"{name}  sha256:{hashlib.sha256(key.encode()).hexdigest()}  {datetime.now(UTC):%Y-%m-%d}\n"
    storage, file = locate(path)
    while True:
        found = storage.read_versioned(file)
        if found is None:
            if storage.create(file, line.encode()):
                return key
            continue
        data, version = found
        if name in _parse(data, path).values():
            raise SpecError(f"{path}: {name} has a key already; choose another name, or take its line out")
        before = data if not data or data.endswith(b"\n") else data + b"\n"
        if storage.replace(file, before + line.encode(), version):
            return key


def _parse(data: bytes, path: str) -> dict[str, str]:
    """Digest → name."""
    digests: dict[str, str] = {}
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise SpecError(
                f"{path}, line {number}: expected NAME sha256:DIGEST, as `dray keys new NAME {path}` writes it"
            )
        if match["name"] in digests.values():
            raise SpecError(f"{path}, line {number}: {match['name']} is there twice")
        digests[match["digest"]] = match["name"]
    return digests
