"""Whose failure each exception of the libraries below is; raised for real wherever that takes no server and no engine."""

from __future__ import annotations

import errno
import http.client
import inspect
import io
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import botocore.exceptions
import botocore.parsers
import botocore.session
import jinja2
import pyarrow as pa
import pyarrow.lib
import pyarrow.parquet as pq
import pydantic
import pytest
import ray.exceptions
from botocore.config import Config

from pipelines import errors, scopes
from pipelines.errors import EngineDied, InputError, RowError, SpecError, StorageError, TransientStorageError
from pipelines.scopes import SCOPES, is_passing, scope_of
from pipelines.settings import SamplingSettings
from pipelines.stage import Failure


def _exceptions(module: ModuleType) -> list[type[BaseException]]:
    """What a module defines and exports. Warnings are never raised."""
    return [
        kind
        for name, kind in vars(module).items()
        if inspect.isclass(kind)
        and issubclass(kind, BaseException)
        and not issubclass(kind, Warning)
        and kind.__module__ == module.__name__
        and not name.startswith("_")
    ]


@pytest.mark.parametrize(
    ("module", "least"), [(ray.exceptions, 40), (botocore.exceptions, 95), (pyarrow.lib, 9), (errors, 20)]
)
def test_every_exception_of_a_library_has_a_scope_on_purpose(module: ModuleType, least: int) -> None:
    """A class or base of the library itself is listed, not merely the Python class that it happens to extend."""
    found = _exceptions(module)
    assert len(found) >= least
    assert [kind.__name__ for kind in found if kind is not errors.DrayError and not _listed(kind)] == []


def _listed(kind: type[BaseException]) -> bool:
    own = [ancestor for ancestor in kind.__mro__ if ancestor.__module__ != "builtins"]
    return any(f"{ancestor.__module__}.{ancestor.__qualname__}" in SCOPES for ancestor in own)


def test_every_entry_is_a_class_of_what_is_installed() -> None:
    """A name that no release in range has would be a typing mistake that nothing else notices."""
    import aiohttp
    import fsspec.exceptions
    import pydantic_core

    installed = {
        f"{kind.__module__}.{kind.__qualname__}"
        for module in (
            errors, ray.exceptions, botocore.exceptions, botocore.parsers, pyarrow.lib, jinja2, aiohttp, fsspec.exceptions, pydantic_core,
            http.client,
        )
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, BaseException)
    }  # fmt: skip
    elsewhere = ("builtins.", "vllm.", "torch.")  # the latter two in tests/local/test_scopes_vllm.py
    assert [name for name in SCOPES if name not in installed and not name.startswith(elsewhere)] == []


# ── Python, pyarrow, jinja2, pydantic, tokenizers ────────────────────────────────────────────────────────────────


def raised(call: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011 -- whichever it is
        call()
    return caught.value


def _parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": ["x" * 1000] * 100}), sink)
    return sink.getvalue()


def _disk_full() -> None:
    with open("/dev/full", "w") as full:
        full.write("x")


def _tokenizer() -> None:
    from tokenizers import Tokenizer

    Tokenizer.from_str("{}")


OBSERVED: list[tuple[Callable[[], Any], type[BaseException], str]] = [
    (lambda: "x" * 2**62, MemoryError, "shard"),
    (_disk_full, OSError, "shard"),
    (lambda: pq.read_table(io.BytesIO(b"no parquet")), pa.ArrowInvalid, "shard"),
    (lambda: pq.read_table(io.BytesIO(_parquet()[:-400])), pa.ArrowInvalid, "shard"),
    (lambda: pa.ipc.open_file(io.BytesIO(b"ARROW1" * 5)), pa.ArrowInvalid, "shard"),
    (lambda: pa.array([1, "a"]), pa.ArrowInvalid, "shard"),
    (lambda: pa.array([1.5]).cast(pa.list_(pa.string())), pa.ArrowNotImplementedError, "shard"),
    (lambda: pa.array([1], pa.string()), pa.ArrowTypeError, "shard"),
    (lambda: pa.allocate_buffer(2**62), pa.ArrowMemoryError, "shard"),
    (lambda: jinja2.Template("{{ a.b.c }}").render(), jinja2.UndefinedError, "row"),
    (lambda: jinja2.Template("{% if"), jinja2.TemplateSyntaxError, "row"),
    (lambda: SamplingSettings(temperature=-1), pydantic.ValidationError, "job"),
    (_tokenizer, Exception, "shard"),  # a bare Exception
    (lambda: {}["x"], KeyError, "shard"),
]


@pytest.mark.parametrize(("call", "kind", "scope"), OBSERVED, ids=range(len(OBSERVED)))
def test_what_libraries_raise(call: Callable[[], Any], kind: type[BaseException], scope: str) -> None:
    error = raised(call)
    assert isinstance(error, kind)
    assert scope_of(error) == scope
    failure = Failure.of("commit", error)
    assert failure.scope == ("job" if scope == "job" else "shard")  # where the row is unknown, its shard
    assert isinstance(failure.to_error(), errors.DrayError)


@pytest.mark.parametrize(
    ("error", "scope"),
    [
        (RowError("prompt_error", "x"), "row"),
        (EngineDied("x"), "shard"),
        (TransientStorageError("x"), "shard"),
        (InputError("x"), "shard"),
        (StorageError("no space left on the device"), "job"),
        (SpecError("x"), "job"),
        (errors.EngineStartError("CUDA out of memory"), "job"),
        (errors.CodeMismatch("x"), "job"),
    ],
)
def test_drays_own_tree(error: BaseException, scope: str) -> None:
    assert scope_of(error) == scope


# ── botocore, from botocore itself; what a server and a socket do is in tests/local ──────────────────────────────


def _s3(**config: Any) -> Any:
    options = {"connect_timeout": 0.2, "read_timeout": 0.2, "retries": {"max_attempts": 0}, **config}
    return botocore.session.Session().create_client(
        "s3", "us-east-1", endpoint_url="http://127.0.0.1:9", aws_access_key_id="k", aws_secret_access_key="s",
        config=Config(**options),
    )  # fmt: skip


def _profile() -> None:
    botocore.session.Session(profile="nobody").create_client("s3", "us-east-1")


def _no_credentials() -> None:
    from botocore.stub import Stubber

    session = botocore.session.Session()
    session.set_config_variable("metadata_service_num_attempts", 0)
    client = session.create_client("s3", "us-east-1", endpoint_url="http://127.0.0.1:9")
    Stubber(client)
    client.list_buckets()


@pytest.mark.parametrize(
    ("call", "kind", "scope", "passing"),
    [
        (lambda: _s3().list_buckets(), botocore.exceptions.EndpointConnectionError, "shard", True),
        (lambda: _s3().get_object(Bucket="b"), botocore.exceptions.ParamValidationError, "job", False),
        (lambda: _s3().no_such_call(), AttributeError, "shard", False),
        (_profile, botocore.exceptions.ProfileNotFound, "job", False),
        (_no_credentials, botocore.exceptions.NoCredentialsError, "job", False),
        (
            lambda: botocore.parsers.create_parser("rest-xml").parse(
                {"status_code": 200, "headers": {}, "body": b"<html>"},
                _s3().meta.service_model.operation_model("ListBuckets").output_shape,
            ),
            botocore.parsers.ResponseParserError,
            "shard",
            True,
        ),
    ],
)
def test_botocore(call: Callable[[], Any], kind: type[BaseException], scope: str, passing: bool) -> None:
    error = raised(call)
    assert isinstance(error, kind)
    assert (scope_of(error), is_passing(error)) == (scope, passing)


@pytest.mark.parametrize(
    ("error", "scope", "passing"),
    [
        (botocore.exceptions.SSLError(endpoint_url="u", error="e"), "job", False),
        (botocore.exceptions.FlexibleChecksumError(error_msg="m"), "shard", True),
        (botocore.exceptions.ChecksumError(checksum_type="crc32", expected_checksum=1, actual_checksum=2), "shard", True),
        (http.client.IncompleteRead(b""), "shard", True),
        (ConnectionResetError(errno.ECONNRESET, "x"), "shard", True),
        (TimeoutError(), "shard", True),
        (ray.exceptions.GetTimeoutError("also a TimeoutError"), "shard", False),
    ],
)  # fmt: skip
def test_of_two_bases_the_nearer_one_decides(error: BaseException, scope: str, passing: bool) -> None:
    assert (scope_of(error), is_passing(error)) == (scope, passing)


# ── Wrappers, and vLLM's two generations ─────────────────────────────────────────────────────────────────────────


def test_a_wrapper_is_what_it_wraps() -> None:
    wrapped = ray.exceptions.RayTaskError("f", "trace", StorageError("disk full")).as_instanceof_cause()
    assert isinstance(wrapped, ray.exceptions.RayTaskError)
    assert scope_of(wrapped) == "job"
    assert scope_of(ray.exceptions.RayTaskError("f", "trace", ray.exceptions.WorkerCrashedError())) == "shard"
    assert scope_of(ray.exceptions.UserCodeException("x")) == "shard"


def _generation(base: dict[str, tuple[type[BaseException], ...]]) -> dict[str, type[BaseException]]:
    made: dict[str, type[BaseException]] = {}
    for name, bases in base.items():
        module = "vllm.v1.engine.exceptions" if name.startswith("Engine") else "vllm.exceptions"
        made[name] = type(name, bases, {"__module__": module})
    return made


def test_vllm_0_26_has_other_bases() -> None:
    """The classes of vllm/exceptions.py and vllm/v1/engine/exceptions.py at v0.26.0, by name and base."""
    vllm = _generation(
        {
            "VLLMValidationError": (ValueError,),
            "VLLMNotFoundError": (Exception,),
            "VLLMUnprocessableEntityError": (ValueError,),
            "EngineGenerateError": (Exception,),
            "EngineDeadError": (Exception,),
        }
    )
    assert scope_of(vllm["VLLMValidationError"]("x")) == "row"
    assert scope_of(vllm["VLLMNotFoundError"]("x")) == "row"
    assert scope_of(vllm["VLLMUnprocessableEntityError"]("x")) == "row"
    assert scope_of(vllm["EngineDeadError"]("x")) == "shard"
    wrapper = vllm["EngineGenerateError"]("x")
    assert scope_of(wrapper, of_request=True) == "shard"
    wrapper.__cause__ = TypeError("not an integer")
    assert scope_of(wrapper, of_request=True) == "row"
    wrapper.__cause__ = RuntimeError("a bug of the engine")
    assert scope_of(wrapper, of_request=True) == "shard"
    assert scope_of(ValueError("refused"), of_request=True) == "row"
    assert scope_of(ValueError("anywhere else")) == "shard"


def test_a_failure_of_the_job_keeps_its_name_on_the_way_to_the_driver() -> None:
    failure = Failure.of("prepare", raised(lambda: SamplingSettings(temperature=-1)))
    assert failure.scope == "job"
    error = Failure(**json.loads(json.dumps(vars(failure)))).to_error()
    assert isinstance(error, errors.JobError)
    assert str(error).startswith("prepare: ValidationError: ")
    assert isinstance(Failure.of("generate", EngineDied("gone")).to_error(), EngineDied)


def test_entries_are_scopes() -> None:
    assert set(SCOPES.values()) | set(scopes.REQUEST_SCOPES.values()) <= {
        "row",
        "shard",
        "passing",
        "job",
        "cause",
    }
