"""OpenAI's Batch API over HTTP: files, batches and models, for `openai` clients whose `base_url` points here.

    GET    /v1/models                 POST /v1/batches                GET /health
    POST   /v1/files                  GET  /v1/batches[/{id}]         GET /metrics
    GET    /v1/files[/{id}[/content]] POST /v1/batches/{id}/cancel
    DELETE /v1/files/{id}

https://platform.openai.com/docs/api-reference/batch. Who asks is told by `Authorization: Bearer KEY` (`jobs.api_keys`); errors
have OpenAI's shape. Everything else that is asked for is a 404.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from jobs.access_log import AccessLog, BodyTooLarge, Measured
from jobs.api_keys import NOBODY, ApiKeys
from jobs.batch_records import BatchRecord, FileRecord
from jobs.batch_store import BatchStore
from jobs.batch_worker import BatchWorker
from jobs.durations import seconds_of
from jobs.openai_body import ENDPOINTS
from pipelines.errors import DrayError

#: Most records that one page of a list has; of batches so many by default. OpenAI's numbers.
_MOST, _PAGE = 10_000, 20
_LONGEST_S = 365 * 24 * 3600.0
#: The largest body that is no upload, and what an upload's form may have besides its file.
_BODY_BYTES = 64 << 10


class ApiError(Exception):
    """What a client did wrong."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def _window(text: str) -> str:
    if not 0 < (seconds_of(text) or 0) <= _LONGEST_S:
        raise ValueError(f"{text[:40]!r} is no time such as 24h or 7d, of a year at most")
    return text


class NewBatch(BaseModel):
    """The body of `POST /v1/batches`. What is not served, such as `output_expires_after`, is refused by name."""

    model_config = ConfigDict(extra="forbid")

    input_file_id: str
    endpoint: str
    completion_window: Annotated[str, AfterValidator(_window)]
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = None


class BatchApi:
    """The routes. Those without `async` block, and run on threads."""

    def __init__(
        self, store: BatchStore, worker: BatchWorker, keys: ApiKeys | None, *, max_file_bytes: int
    ) -> None:
        self._store, self._worker, self._keys = store, worker, keys
        self._max_file_bytes = max_file_bytes

    def app(self, log: AccessLog) -> ASGIApp:
        """The ASGI application."""
        get: Mapping[str, Any] = {
            "/health": self.health,
            "/metrics": log.metrics,
            "/v1/models": self.models,
            "/v1/models/{id:path}": self.model,
            "/v1/files": self.files,
            "/v1/files/{id}": self.file,
            "/v1/files/{id}/content": self.content,
            "/v1/batches": self.batches,
            "/v1/batches/{id}": self.batch,
        }
        routes = [
            *(Route(path, endpoint, methods=["GET"]) for path, endpoint in get.items()),
            Route("/v1/files", self.upload, methods=["POST"]),
            Route("/v1/files/{id}", self.delete, methods=["DELETE"]),
            Route("/v1/batches", self.create, methods=["POST"]),
            Route("/v1/batches/{id}/cancel", self.cancel, methods=["POST"]),
        ]
        app = Starlette(
            routes=routes,
            exception_handlers={
                ApiError: _client_error,
                BodyTooLarge: _too_large,
                ClientDisconnect: _gone,
                HTTPException: _http_error,
                DrayError: _storage_error,
                Exception: _bug,
            },
        )
        uploads = {"/v1/files": self._max_file_bytes + _BODY_BYTES}
        return Measured(app, log, lambda path: uploads.get(path, _BODY_BYTES))

    # ── Without a key ────────────────────────────────────────────────────────────────────────────────────────────

    def health(self, request: Request) -> Response:
        """For probes: the server answers, and what it is at."""
        running = self._worker.current
        behind = [batch for batch in self._store.waiting() if batch.id != running]
        return JSONResponse({"status": "ok", "running": running, "waiting": len(behind)})

    # ── Models ───────────────────────────────────────────────────────────────────────────────────────────────────

    def models(self, request: Request) -> Response:
        self._owner(request)
        return _page([_model(name) for name in self._worker.models], last=True)

    def model(self, request: Request) -> Response:
        self._owner(request)
        name = request.path_params["id"]
        if name not in self._worker.models:
            raise ApiError(404, f"The model {name!r} does not exist", code="model_not_found", param="model")
        return JSONResponse(_model(name))

    # ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def upload(self, request: Request) -> Response:
        owner = await run_in_threadpool(self._owner, request)
        async with request.form(max_files=1) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if others := sorted(form.keys() - {"file", "purpose"}):
                raise ApiError(400, f"{others[0]} is not served; leave it out", param=others[0])
            if not isinstance(file, UploadFile):
                raise ApiError(400, "give the file as the form's field 'file'", param="file")
            if purpose != "batch":
                raise ApiError(400, f"purpose is {purpose!r}; only 'batch' is served here", param="purpose")
            if not file.size:
                raise ApiError(400, "the file is empty", code="empty_file", param="file")
            name = file.filename or "batch.jsonl"
            record = await run_in_threadpool(self._store.add_file, owner, name, file.file)
        return JSONResponse(record.to_openai())

    def files(self, request: Request) -> Response:
        records = self._store.files(self._owner(request))
        purpose = request.query_params.get("purpose")
        return _listed(request, [record for record in records if purpose in (None, record.purpose)], _MOST)

    def file(self, request: Request) -> Response:
        return JSONResponse(self._file(request).to_openai())

    def content(self, request: Request) -> Response:
        record = self._file(request)
        return StreamingResponse(
            self._store.content(record),
            media_type="application/jsonl",
            headers={"content-length": str(record.bytes)},
        )

    def delete(self, request: Request) -> Response:
        record = self._file(request)
        if batch := self._store.delete_file(record):
            raise ApiError(400, f"batch {batch.id} has still to read it; cancel the batch first", param="id")
        return JSONResponse({"id": record.id, "object": "file", "deleted": True})

    # ── Batches ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def create(self, request: Request) -> Response:
        owner = await run_in_threadpool(self._owner, request)
        try:
            asked = NewBatch.model_validate_json(await request.body())
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or None
            raise ApiError(400, f"{where or 'body'}: {first['msg']}", param=where) from None
        if asked.endpoint not in ENDPOINTS:
            raise ApiError(
                400, f"endpoint is {asked.endpoint!r}; served are {', '.join(ENDPOINTS)}", param="endpoint"
            )
        batch = await run_in_threadpool(
            lambda: self._store.add_batch(
                owner,
                endpoint=asked.endpoint,
                input_file_id=asked.input_file_id,
                completion_window=asked.completion_window,
                window_s=seconds_of(asked.completion_window) or 0,
                metadata=asked.metadata or {},
            )
        )
        if batch is None:
            raise ApiError(404, f"No such File object: {asked.input_file_id}", param="input_file_id")
        return JSONResponse(batch.to_openai())

    def batches(self, request: Request) -> Response:
        return _listed(request, self._store.batches(self._owner(request)))

    def batch(self, request: Request) -> Response:
        return JSONResponse(self._batch(request).to_openai())

    def cancel(self, request: Request) -> Response:
        batch = self._batch(request)
        if batch.has_ended:
            raise ApiError(400, f"Cannot cancel a batch with status '{batch.status}'.", param="batch_id")
        self._store.move(batch.id, "cancelled", only_from="validating")
        return JSONResponse(self._store.move(batch.id, "cancelling", only_from="in_progress").to_openai())

    # ── Who asks, and for what ───────────────────────────────────────────────────────────────────────────────────

    def _owner(self, request: Request) -> str:
        if self._keys is None:
            return NOBODY
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        owner = self._keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            given = "Incorrect API key provided" if key else "You didn't provide an API key"
            raise ApiError(401, f"{given}; send Authorization: Bearer YOUR_KEY", code="invalid_api_key")
        request.scope["owner"] = owner  # for the access log
        return owner

    def _file(self, request: Request) -> FileRecord:
        id_ = request.path_params["id"]
        found = self._store.file(self._owner(request), id_)
        if found is None:
            raise ApiError(404, f"No such File object: {id_}", param="id")
        return found

    def _batch(self, request: Request) -> BatchRecord:
        id_ = request.path_params["id"]
        found = self._store.batch(self._owner(request), id_)
        if found is None:
            raise ApiError(404, f"No batch found with id '{id_}'.", param="batch_id")
        return found


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "dray"}


def _listed(request: Request, records: Sequence[FileRecord | BatchRecord], page: int = _PAGE) -> Response:
    """One page, by the query's `after`, `limit` and `order`; the latest first, unless that is `asc`."""
    rising = request.query_params.get("order") == "asc"
    try:
        limit = int(request.query_params.get("limit", page))
    except ValueError:
        limit = 0
    if not 1 <= limit <= _MOST:
        raise ApiError(400, f"limit must be from 1 to {_MOST:,}", param="limit")
    after = request.query_params.get("after")
    ordered = list(reversed(records)) if rising else list(records)
    if after is not None:
        ordered = [record for record in ordered if (record.id > after if rising else record.id < after)]
    return _page([record.to_openai() for record in ordered[:limit]], last=len(ordered) <= limit)


def _page(found: list[dict[str, Any]], *, last: bool) -> Response:
    ids = [one["id"] for one in found] or [None]
    return JSONResponse(
        {"object": "list", "data": found, "first_id": ids[0], "last_id": ids[-1], "has_more": not last}
    )


def _error(status: int, message: str, code: str | None = None, param: str | None = None) -> Response:
    kind = (
        "server_error"
        if status >= 500
        else "authentication_error"
        if status == 401
        else "invalid_request_error"
    )
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, {"www-authenticate": "Bearer"} if status == 401 else None)


def _client_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error(error.status, str(error), error.code, error.param)


def _too_large(request: Request, error: Exception) -> Response:
    return _error(413, str(error), "request_too_large")


def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it but the access log; nginx's code for this


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code in (404, 405):
        return _error(
            error.status_code, f"Unknown request URL: {request.method} {request.url.path}", "unknown_url"
        )
    return _error(error.status_code, str(error.detail))


def _storage_error(request: Request, error: Exception) -> Response:
    return _error(503, "the server's storage does not answer; try again")


def _bug(request: Request, error: Exception) -> Response:
    return _error(500, "The server had an error while processing your request.")
