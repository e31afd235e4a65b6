"""Whose failure an exception is: one row's, one shard's, or the whole job's (design §5).

    exception ──its classes, nearest first──► SCOPES ──row───► recorded in the row's place, where the row is known
                                                     ├─shard─► again, up to `errors.max_attempts`; `passing`: in place first
                                                     ├─job───► stop, with one message
                                                     └─cause─► a wrapper: as what is inside
              not listed: in user code or a template the row's, elsewhere the shard's

By qualified name, so that nothing is imported to look an exception up, and so that both ends of vLLM's range (0.26 to
0.32) fit into one table. A test holds every class that ray.exceptions, botocore.exceptions, vllm.exceptions and pyarrow
export against it: a release with a new base class needs a decision here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

Scope = Literal["row", "shard", "job"]

#: What a class says of its failures: a scope; `passing`, a shard's which the same call may survive a little later, so
#: that `storage_faults.persist` tries again first; or `cause`, nothing of its own.
Entry = Literal["row", "shard", "passing", "job", "cause"]

SCOPES: Mapping[str, Entry] = {
    # ── Dray: the tree of pipelines/errors.py ──
    "pipelines.errors.RowError": "row",
    "pipelines.errors.ShardError": "shard",
    "pipelines.errors.JobError": "job",
    "pipelines.errors.BadInput": "job",  # the same credentials, model and disk meet every shard
    "pipelines.errors.InputError": "shard",  # but a file that is gone, changed or damaged is in one shard only
    # ── Python ──
    "builtins.MemoryError": "shard",  # this worker's memory; in a template or user code it is the row's, as any other
    # Disk full among them: of a worker's own disk. A full output is a StorageFull by the time it comes here.
    "builtins.OSError": "shard",
    "builtins.ConnectionError": "passing",
    "builtins.TimeoutError": "passing",
    "http.client.IncompleteRead": "passing",
    # ── vLLM 0.32: VLLMError over VLLMClientError (the request's fault) and VLLMServerError; 0.26 has neither base ──
    "vllm.exceptions.VLLMError": "shard",  # GracefulHTTPError among them: "the engine is busy"
    "vllm.exceptions.VLLMClientError": "row",
    "vllm.exceptions.VLLMServerError": "shard",
    "vllm.exceptions.VLLMValidationError": "row",  # 0.26: a ValueError; 0.32: a VLLMClientError
    "vllm.exceptions.VLLMNotFoundError": "row",  # 0.26: an Exception; 0.32: a VLLMClientError
    "vllm.exceptions.VLLMUnprocessableEntityError": "row",  # 0.26: a ValueError; 0.32: a VLLMClientError
    "vllm.v1.engine.exceptions.EngineDeadError": "shard",  # 0.26: an Exception; 0.32: a VLLMServerError
    "vllm.v1.engine.exceptions.EngineGenerateError": "cause",  # likewise
    # ── torch: the memory of a device that something else fills meanwhile. While an engine starts it is an
    #    EngineStartError, and in EngineCore it ends that process (EngineDeadError) ──
    "torch.OutOfMemoryError": "shard",
    "torch.AcceleratorError": "shard",
    # ── Ray 2.60: lost processes, nodes and objects, a worker killed for memory (OutOfMemoryError), a full disk ──
    "ray.exceptions.RayError": "shard",
    "ray.exceptions.RayTaskError": "cause",
    "ray.exceptions.UserCodeException": "cause",
    "ray.exceptions.AuthenticationError": "job",
    "ray.exceptions.RuntimeEnvSetupError": "job",
    # Beside RayError they are ValueErrors.
    "ray.exceptions.ActorAlreadyExistsError": "shard",
    "ray.exceptions.ActorHandleNotFoundError": "shard",
    # ── botocore and aiobotocore: what an S3 server answers is a ClientError, judged by its code in storage_faults ──
    "botocore.exceptions.ClientError": "shard",
    "botocore.exceptions.BotoCoreError": "job",  # credentials, profile, region, parameters: settings
    "botocore.exceptions.UndefinedModelAttributeError": "job",
    "botocore.exceptions.HTTPClientError": "passing",
    "botocore.exceptions.ConnectionError": "passing",
    "botocore.exceptions.SSLError": "job",  # a certificate does not mend itself
    "botocore.exceptions.IncompleteReadError": "passing",
    "botocore.exceptions.ChecksumError": "passing",  # the body was damaged on the way
    "botocore.exceptions.FlexibleChecksumError": "passing",
    "botocore.exceptions.MetadataRetrievalError": "passing",  # the machine's own metadata service did not answer
    "botocore.exceptions.CapacityNotAvailableError": "passing",
    "botocore.parsers.ResponseParserError": "passing",  # HTML where XML should be: a proxy that has trouble
    # ── aiohttp (below s3fs, and for http://) and fsspec ──
    "aiohttp.client_exceptions.ClientError": "shard",  # of an answer: by its status in storage_faults
    "aiohttp.client_exceptions.ClientConnectionError": "passing",
    "aiohttp.client_exceptions.ClientPayloadError": "passing",
    "aiohttp.client_exceptions.ClientSSLError": "job",
    "aiohttp.client_exceptions.ServerFingerprintMismatch": "job",
    "aiohttp.client_exceptions.InvalidURL": "job",
    "fsspec.exceptions.FSTimeoutError": "passing",
    "fsspec.exceptions.BlocksizeMismatchError": "shard",
    # ── pyarrow: bytes that are not what they should be. Reading an input makes an InputError of it ──
    "pyarrow.lib.ArrowException": "shard",
    "pyarrow.lib.ArrowMemoryError": "shard",
    # ── What runs on a row's own text; tokenizers and transformers raise bare Exceptions, which are not listed ──
    "jinja2.exceptions.TemplateError": "row",
    # ── pydantic: settings that do not fit are the same for all shards ──
    "pydantic_core._pydantic_core.ValidationError": "job",
}

#: While an engine looks at one request, beside `SCOPES`: vLLM refuses some requests with Python's own classes (a bare
#: ValueError up to 0.26, TypeError and OverflowError of its serializer inside EngineGenerateError).
REQUEST_SCOPES: Mapping[str, Entry] = {
    "builtins.ValueError": "row",
    "builtins.TypeError": "row",
    "builtins.OverflowError": "row",
    "pydantic_core._pydantic_core.ValidationError": "row",
}


def scope_of(error: BaseException, *, of_request: bool = False) -> Scope:
    """Whose failure it is, of an exception that no user code and no template raised.

    `of_request`: it ended one request to an engine that lives on.
    """
    entry = _entry(error, {**SCOPES, **REQUEST_SCOPES} if of_request else SCOPES)
    return entry if entry == "row" or entry == "job" else "shard"


def is_passing(error: BaseException) -> bool:
    """Whether the class alone says that the same call may succeed a little later."""
    return _entry(error, SCOPES) == "passing"


def listed(kind: type[BaseException]) -> tuple[str, Entry] | None:
    """The nearest class of `kind`'s ancestry that is in the table, and what the table says of it."""
    for name in _names(kind):
        if name in SCOPES:
            return name, SCOPES[name]
    return None


def _entry(error: BaseException, table: Mapping[str, Entry]) -> Entry | None:
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        entry = next((table[name] for name in _names(type(error)) if name in table), None)
        # Ray keeps what it wraps under a name of its own, since a cause does not survive pickling.
        inside = getattr(error, "cause", None) or error.__cause__
        if entry != "cause" or not isinstance(inside, BaseException):
            return entry
        error = inside
    return "cause"


def _names(kind: type[BaseException]) -> Iterator[str]:
    for ancestor in kind.__mro__:
        yield f"{ancestor.__module__}.{ancestor.__qualname__}"
