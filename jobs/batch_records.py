"""A file and a batch of the batch API: what is stored of them, and what OpenAI's clients are told.

The fields are those of https://platform.openai.com/docs/api-reference/batch/object and …/files/object. Times are Unix
times in whole seconds.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

Status = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]

#: What a file is for: requests, or what became of them.
Purpose = Literal["batch", "batch_output"]
#: In these nothing will change any more.
ENDED: frozenset[Status] = frozenset({"failed", "completed", "expired", "cancelled"})


def new_id(kind: str) -> str:
    """`batch_…` or `file-…`; ids of later calls sort behind those of earlier ones."""
    return f"{kind}{time.time_ns():016x}{secrets.token_hex(4)}"


class _Record:
    """Of one JSON object."""

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Fields of a later version are left out."""
        known = {item.name for item in fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: value for name, value in json.loads(data).items() if name in known})


@dataclass(frozen=True, kw_only=True)
class FileRecord(_Record):
    """An uploaded file, or one of a batch's results."""

    id: str
    owner: str
    """The name of the key that it came by; nobody else sees it."""
    filename: str
    purpose: Purpose
    bytes: int
    created_at: int

    def to_openai(self) -> dict[str, Any]:
        """`openai.types.FileObject`."""
        told = asdict(self)
        del told["owner"]
        return {**told, "object": "file", "status": "processed", "expires_at": None}


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """Why a batch was not run."""

    code: str
    message: str
    line: int | None = None
    """Of the input file, the first is 1."""
    param: str | None = None


@dataclass(frozen=True, kw_only=True)
class BatchRecord(_Record):
    """One batch, from its creation on."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    status: Status = "validating"
    metadata: dict[str, str] = field(default_factory=dict)
    model: str | None = None
    """The name that its requests call the model by; known once it is checked."""
    encoding_format: str = "float"
    """Of embeddings, likewise."""
    errors: list[dict[str, Any]] = field(default_factory=list)
    """`Mistake`s as they are told."""
    output_file_id: str | None = None
    error_file_id: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    def to_openai(self) -> dict[str, Any]:
        """`openai.types.Batch`."""
        told = asdict(self)
        counts = {name: told.pop(name) for name in ("total", "completed", "failed")}
        errors = told.pop("errors")
        del told["owner"], told["encoding_format"]
        return {
            **told,
            "object": "batch",
            "errors": {"object": "list", "data": errors} if errors else None,
            "request_counts": counts,
        }
