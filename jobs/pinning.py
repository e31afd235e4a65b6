"""One revision of the model for all of a job: what its name stood for when the job was planned.

A hub's `main` moves and a bucket's folder can be overwritten; a run that is taken up a week later shall go on with the
model that it began with. The pin is stored in `.dray/spec.json` and used by every later run of the output that asks for
the same model. It counts in the fingerprint as `model.revision`. Local folders have a digest there instead.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jobs.loading import LoadedJob
from pipelines.model_cache import cached_model
from pipelines.model_hub import HubSilent
from pipelines.model_shape import cached
from pipelines.model_source import open_source
from pipelines.model_weights import check_weights
from pipelines.settings import ModelSettings

#: Key of the pin in `.dray/spec.json`.
PIN = "model_pin"


def pinned(job: LoadedJob, record: Mapping[str, Any] | None) -> LoadedJob:
    """The job with the revisions that its output's `record` has pinned, or else with those that are there now.

    Raises ModelError for a model that is not there, that changed since, or whose weights are pickles.
    """
    model = job.spec.model
    asked = _asked(model)
    stored = (record or {}).get(PIN)
    if stored and stored["asked"] == asked:
        pin = {**stored, "how": "pinned by this output's first plan"}
        _check_still_there(model, pin)
    elif record is not None and PIN not in record and not _is_url(model.source):
        return job  # an output of a Dray that pinned nothing
    else:
        pin = {"asked": asked, **_resolved(model)}
    update: dict[str, Any] = {"revision": pin["revision"]}
    if pin["tokenizer_revision"]:
        update["engine"] = {**model.engine, "tokenizer_revision": pin["tokenizer_revision"]}
    if model.lora and pin["lora_revision"]:
        update["lora"] = model.lora.model_copy(update={"revision": pin["lora_revision"]})
    spec = job.spec.model_copy(update={"model": model.model_copy(update=update)})
    return replace(job, spec=spec, pin=pin)


def described(pin: Mapping[str, Any] | None) -> str | None:
    """A line for the terminal; None where there is nothing to pin."""
    if not pin or pin["how"] is None:
        return None
    return f"{pin['asked']['source']} at {pin['revision'] or 'its default revision'} ({pin['how']})"


def _asked(model: ModelSettings) -> dict[str, Any]:
    return {
        "source": model.source,
        "revision": model.revision,
        "tokenizer": model.tokenizer,
        "tokenizer_revision": model.engine.get("tokenizer_revision"),
        "lora": model.lora.model_dump() if model.lora else None,
    }


def _resolved(model: ModelSettings) -> dict[str, Any]:
    revision, how = _revision_of(model.source, model.revision, model, weights=model.backend == "vllm")
    tokenizer = lora = None
    if model.tokenizer and model.tokenizer != model.source and not os.path.isabs(model.tokenizer):
        # Left out, the tokenizer would take the model's revision, which is another repository's.
        wanted = model.engine.get("tokenizer_revision") or model.revision
        tokenizer = _revision_of(model.tokenizer, wanted, model)[0] or "main"
    if model.lora:
        lora = _revision_of(model.lora.source, model.lora.revision, model)[0]
    return {"revision": revision, "tokenizer_revision": tokenizer, "lora_revision": lora, "how": how}


def _revision_of(
    source: str, asked: str | None, model: ModelSettings, *, weights: bool = False
) -> tuple[str | None, str | None]:
    """The revision that is there now, and how that is known; None, None for a folder of this machine."""
    if os.path.isabs(source):
        return asked, None
    token = model.engine.get("hf_token")
    origin = open_source(source, asked, model.storage_options, token=token)
    try:
        found = origin.revision()
    except HubSilent as silence:
        snapshot = cached(source, model.model_copy(update={"revision": asked}))
        if snapshot is not None:
            if weights:
                check_weights(source, (path.name for path in snapshot.iterdir()), model.engine)
            return snapshot.name, "as the local hub cache has it; the hub was not asked"
        if entry := cached_model(source, asked=asked):
            return entry[1].revision, "as this node's model cache has it; the hub was not asked"
        return asked, f"not pinned: {silence}"
    if weights:
        check_weights(source, origin.names, model.engine)
    return found, "as it is in the store now" if _is_url(source) else "the hub's commit now"


def _check_still_there(model: ModelSettings, pin: Mapping[str, Any]) -> None:
    """Before any engine starts: a stored model that was replaced since can only come from this node's cache."""
    revision, options = pin["revision"], model.storage_options
    if _is_url(model.source) and cached_model(model.source, revision, options) is None:
        open_source(model.source, revision, options).revision()


def _is_url(source: str) -> bool:
    return "://" in source
