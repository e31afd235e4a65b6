"""What one job needs of this machine: its input, its output, the store's clock, its engine arguments and its model."""

from __future__ import annotations

import contextlib
import email.utils
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from jobs.doctor_finding import Finding, attempt, gib
from jobs.doctor_gpu import Gpus
from jobs.doctor_model import find, fits_gpus, fits_ram, tokenizer_findings
from jobs.engines import engines_of, hardware_here
from jobs.places import scheme
from jobs.spec import JobSpec
from pipelines.engine_args import check_engine_args, known_engine_args
from pipelines.listing import list_files
from pipelines.model_shape import weights_in_memory
from pipelines.storage import Storage

#: AWS refuses requests whose time is off by more: https://docs.aws.amazon.com/AmazonS3/latest/API/RESTAuthentication.html
S3_SKEW_S = 15 * 60
_STORAGE_LIMIT_S = 20.0
_MODEL_LIMIT_S = 30.0


def job_findings(spec: JobSpec, gpus: Gpus) -> Iterator[Finding]:
    """All checks of one job, the quick ones first."""
    yield from attempt(
        "engine arguments", lambda: engine_arguments(spec), remedy="correct model.engine in the job file"
    )
    yield from attempt(
        "input",
        lambda: input_findings(spec),
        limit_s=_STORAGE_LIMIT_S,
        remedy="correct input.path or input.storage_options; to see more: dray plan --debug",
    )
    yield from attempt(
        "output",
        lambda: output_findings(spec),
        limit_s=_STORAGE_LIMIT_S,
        remedy="correct output.path or output.storage_options",
    )
    with contextlib.suppress(
        OSError, ValueError
    ):  # a look by the way: the lines above tell whether the store answers
        yield from clock_findings(spec)
    if spec.model.backend == "simulated":
        yield Finding("model", "ok", "simulated engine: no model needed")
        return
    yield from attempt(
        "model", lambda: model_findings(spec, gpus), limit_s=_MODEL_LIMIT_S, remedy="correct model.source"
    )


def engine_arguments(spec: JobSpec) -> Iterator[Finding]:
    """The names in `model.engine`, against the installed vLLM's."""
    check_engine_args(spec.model.engine)
    if known_engine_args() is None and spec.model.engine:
        yield Finding(
            "engine arguments",
            "note",
            "vLLM is not installed here, so their names are not checked",
            "make setup",
        )
        return
    given = ", ".join(spec.model.engine) or "none given"
    yield Finding("engine arguments", "ok", given)


def input_findings(spec: JobSpec) -> Iterator[Finding]:
    """List the input as the plan does, footers included."""
    files = list_files(spec.input)
    rows = sum(file.estimated_rows or 0 for file in files)
    size = sum(file.size for file in files)
    about = "" if all(file.rows is not None for file in files) else "about "
    count = "1 file" if len(files) == 1 else f"{len(files):,} files"
    yield Finding("input", "ok", f"{count}, {gib(size)}, {about}{rows:,} rows")


def output_findings(spec: JobSpec) -> Iterator[Finding]:
    """Write and remove a probe; folders that were not there before go again."""
    storage = Storage(spec.output.path, spec.output.storage_options, patience_s=5)
    made: list[Path] = []
    if storage.is_local:
        probe = Path(storage.root) / ".dray" / "tmp"
        made = [folder for folder in (probe, *probe.parents) if not folder.exists()]
    try:
        exclusive = storage.check_writable()
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # not made after all, or in use by now
                folder.rmdir()
    if exclusive:
        yield Finding("output", "ok", f"{storage.url()} is writable, and creates objects exclusively")
    else:
        yield Finding(
            "output",
            "note",
            f"{storage.url()} is writable, but cannot create an object only where there is none",
            "never run two drivers on this output at once; or choose a local folder or an S3 store with If-None-Match",
        )


def clock_findings(spec: JobSpec) -> Iterator[Finding]:
    """This machine's clock against the S3 servers of the job, one unsigned request each."""
    paths = [spec.input.path] if isinstance(spec.input.path, str) else spec.input.path
    places = [(path, spec.input.storage_options) for path in paths]
    places.append((spec.output.path, spec.output.storage_options))
    for endpoint in sorted({s3_endpoint(options) for path, options in places if scheme(path) == "s3"}):
        request = urllib.request.Request(endpoint, method="HEAD")
        context = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE") or None)
        try:
            with urllib.request.urlopen(request, timeout=3, context=context) as answer:
                date = answer.headers.get("Date")
        except urllib.error.HTTPError as error:  # 403 and 405 carry the date as well
            date = error.headers.get("Date")
        if date:
            yield clock_skew(date, time.time(), endpoint)


def s3_endpoint(options: dict[str, Any]) -> str:
    """Where requests to S3 go."""
    given = options.get("endpoint_url") or (options.get("client_kwargs") or {}).get("endpoint_url")
    named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return str(given or named or "https://s3.amazonaws.com")


def clock_skew(date: str, now: float, server: str) -> Finding:
    """An HTTP `Date` header, exact to the second, against this machine's clock."""
    skew = now - email.utils.parsedate_to_datetime(date).timestamp()
    detail = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} {server}"
    remedy = "set the clock right: timedatectl set-ntp true (or chronyc makestep)"
    if abs(skew) > S3_SKEW_S:
        return Finding("clock", "problem", f"{detail}: S3 refuses more than 15 minutes", remedy)
    if abs(skew) > 60:
        return Finding("clock", "note", detail, remedy)
    return Finding("clock", "ok", f"within {max(abs(skew), 2):.0f} s of {server}")


def model_findings(spec: JobSpec, gpus: Gpus) -> Iterator[Finding]:
    """The model, its tokenizer, and its size against the memory of this machine (for `cluster.address: local`)."""
    place = find(spec.model)
    for finding in place.findings:
        if finding.verdict == "problem" and spec.cluster.address != "local":
            where = f"{finding.detail} (seen from here; the nodes of {spec.cluster.address} load it)"
            yield Finding(finding.name, "note", where, finding.remedy)
        else:
            yield finding
    if any(finding.verdict == "problem" for finding in place.findings):
        return
    yield from tokenizer_findings(spec.model, place.folder)
    if place.parameters is None or spec.cluster.address != "local":
        return
    weights = weights_in_memory(place.parameters, spec.model.engine)
    engine, pool = spec.model.engine, spec.pool
    if gpus.gpus and pool.device != "cpu":
        settled = engines_of(spec, hardware_here(spec))
        packed = settled.pool.engines_per_gpu
        assert packed != "auto"
        yield fits_gpus(
            weights,
            gpus.gpus,
            tensor_parallel=spec.model.tensor_parallel_size,
            pipeline_parallel=int(engine.get("pipeline_parallel_size", 1)),
            utilisation=engine.get("gpu_memory_utilization"),
            engines_per_gpu=packed,
        )
        held = f"{packed} engines share a GPU" if packed != 1 else "one engine has a GPU to itself"
        yield Finding("engines", "ok", f"{settled.pool.most_engines} engines; {held}")
    elif not gpus.present:
        yield fits_ram(weights, psutil.virtual_memory().total, replicas=pool.least_engines)
