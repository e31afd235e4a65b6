"""The job's model: is it there and whole, does its tokenizer load, and does it fit into the memory it will get."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.doctor_finding import GIB, Finding, gib, one_line
from jobs.doctor_gpu import Gpu
from jobs.places import is_url
from pipelines.errors import ModelError
from pipelines.model_shape import cached, count_parameters, weight_files, weight_index
from pipelines.model_weights import loads_weights
from pipelines.settings import ModelSettings
from pipelines.storage import Storage
from pipelines.tokenizer import load_tokenizer

HUB_TIMEOUT_S = 5.0
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
#: Activations, CUDA context and graphs; what vLLM's own memory profile finds for mid-size models is 1 to 3 GiB.
_OVERHEAD = GIB
#: vLLM's default of gpu_memory_utilization (0.9 until 0.31, 0.92 since).
_UTILISATION = 0.9


@dataclass(frozen=True, slots=True)
class Place:
    """Where the model was found. `parameters`: dtype → how many, where that is known."""

    findings: tuple[Finding, ...]
    folder: Path | None = None
    parameters: Mapping[str, int] | None = None


def find(model: ModelSettings) -> Place:
    """Look for the model without loading or downloading it."""
    path = Path(model.source).expanduser()
    if is_url(model.source):
        return _in_storage(model)
    if path.is_dir():
        return _in_folder(model, path, f"{path}")
    if model.source.startswith((".", "~", "/")):
        remedy = (
            "correct model.source: a folder with config.json, or a hub id such as Qwen/Qwen2.5-7B-Instruct"
        )
        return Place((Finding("model", "problem", f"{path}: there is no such folder", remedy),))
    snapshot = cached(model.source, model)
    if snapshot is not None:
        return _in_folder(model, snapshot, f"{model.source} in the hub cache")
    return _on_hub(model)


# ── Places ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _in_folder(model: ModelSettings, folder: Path, named: str) -> Place:
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    index = weight_index(folder)
    problem = folder_problem(named, sizes, index, dummy=not loads_weights(model.engine))
    if problem is not None:
        return Place((problem,), folder)
    files = weight_files(sizes, index)
    try:
        parameters = count_parameters([folder / name for name in files])
    except ModelError as error:
        again = (
            f"hf download {model.source}"
            if folder != Path(model.source).expanduser()
            else "copy the file again"
        )
        return Place((Finding("model", "problem", str(error), again),), folder)
    size = sum(sizes[name] for name in files)
    weights = f"{gib(size)} of weights in {len(files)} file{'s' if len(files) > 1 else ''}"
    detail = f"{named}: {weights if files else 'no safetensors, so its size is not known'}"
    return Place((Finding("model", "ok", detail),), folder, parameters)


def _in_storage(model: ModelSettings) -> Place:
    sizes = {
        info.name: info.size for info in Storage(model.source, model.storage_options, patience_s=5).list()
    }
    problem = folder_problem(model.source, sizes, None, dummy=False)
    found = problem or Finding(
        "model", "ok", f"{model.source}: {gib(sum(sizes.values()))} in {len(sizes)} files"
    )
    return Place((found,))


def _on_hub(model: ModelSettings) -> Place:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    source, token = model.source, model.engine.get("hf_token")
    offline = f"where there is a network: hf download {source} --local-dir <folder>; copy it here and set model.source to it"
    login = f"accept the licence at https://huggingface.co/{source}, then `hf auth login` or set HF_TOKEN"

    def problem(detail: str, remedy: str) -> Place:
        return Place((Finding("model", "problem", detail, remedy),))

    try:
        api = HfApi(token=token)
        info = api.model_info(source, revision=model.revision, timeout=HUB_TIMEOUT_S)
        if info.gated:
            api.auth_check(source)
    except GatedRepoError:
        return problem(f"{source}: its authors give access on request, and this account has none", login)
    except RevisionNotFoundError:
        return problem(f"{source} has no revision {model.revision!r}", "correct model.revision")
    except (RepositoryNotFoundError, HFValidationError):
        remedy = "correct model.source; for a private model `hf auth login` or set HF_TOKEN"
        return problem(f"the hub has no model {source!r}, or hides it", remedy)
    except OfflineModeIsEnabled:
        return problem(
            f"{source} is not in the hub cache, and HF_HUB_OFFLINE is set", f"unset it, or {offline}"
        )
    except Exception as error:  # noqa: BLE001 - whichever HTTP client huggingface_hub has, with errors of its own
        reason = f"{type(error).__name__}: {one_line(str(error), 120)}"
        return problem(f"{source} is not in the hub cache, and the hub does not answer ({reason})", offline)
    names = {file.rfilename: 0 for file in info.siblings or ()}
    wrong = folder_problem(source, names, None, dummy=not loads_weights(model.engine))
    counts = dict(info.safetensors.parameters) if info.safetensors else None
    found = wrong or Finding(
        "model", "ok", f"{source} is on the hub; every node downloads it at its first start"
    )
    return Place((found,), None, counts)


# ── Files ───────────────────────────────────────────────────────────────────────────────────────────────────────


def folder_problem(
    named: str, sizes: Mapping[str, int], index: Mapping[str, Any] | None, *, dummy: bool
) -> Finding | None:
    """What a model folder lacks, by its file names; None when it is complete."""
    if not sizes.keys() & {"config.json", "params.json"}:  # params.json: Mistral's own format
        remedy = "set model.source to the folder that holds config.json"
        return Finding("model", "problem", f"{named}: there is no config.json", remedy)
    if dummy:
        return None
    if not any(name.endswith(_WEIGHTS) for name in sizes):
        remedy = "put the weights (*.safetensors) there, or model.engine.load_format: dummy for random ones"
        return Finding("model", "problem", f"{named}: there are no weights", remedy)
    missing = sorted(set((index or {}).get("weight_map", {}).values()) - sizes.keys())
    if missing:
        detail = f"{named}: {len(missing)} of the index's weight files are missing, {missing[0]} first"
        return Finding(
            "model", "problem", detail, "finish the download (`hf download` goes on where it stopped)"
        )
    return None


# ── Memory ──────────────────────────────────────────────────────────────────────────────────────────────────────


def fits_gpus(
    weights: int,
    gpus: Sequence[Gpu],
    *,
    tensor_parallel: int,
    pipeline_parallel: int = 1,
    utilisation: float | None = None,
    engines_per_gpu: int = 1,
) -> Finding:
    """The weights of one engine against the GPUs of this machine."""
    utilisation = utilisation or _UTILISATION / engines_per_gpu
    ways = tensor_parallel * pipeline_parallel
    smallest = min(gpus, key=lambda gpu: gpu.total)
    if not smallest.total:  # a GPU that shares the host's memory has no number of its own
        return Finding(
            "model memory", "ok", f"{gib(weights)} of weights; {smallest.name} shares the host's memory"
        )
    budget, share = smallest.total * utilisation, weights / ways
    facts = f"{gib(weights)} of weights on {ways} GPU{'s' if ways > 1 else ''} of {gib(smallest.total)}"
    room = f"{gib(share)} each, {gib(budget)} allowed by gpu_memory_utilization {utilisation:g}"
    if ways > len(gpus):
        remedy = (
            f"lower model.engine.tensor_parallel_size to {_power_of_two(len(gpus))}, or use a larger machine"
        )
        return Finding(
            "model memory", "problem", f"one engine needs {ways} GPUs, here are {len(gpus)}", remedy
        )
    if share + _OVERHEAD > budget:
        sizes = [n for n in (2, 4, 8) if tensor_parallel < n <= len(gpus)]
        larger = next((n for n in sizes if weights / (n * pipeline_parallel) + 2 * _OVERHEAD < budget), None)
        remedy = (
            f"set model.engine.tensor_parallel_size: {larger}"
            if larger
            else "use a quantised model (FP8, AWQ) or model.engine.quantization: fp8, or more and larger GPUs"
        )
        return Finding("model memory", "problem", f"{facts}: {room}, too little", remedy)
    busy = next((gpu for gpu in gpus if 0 < gpu.free < gpu.total * utilisation), None)
    if busy is not None and len([g for g in gpus if g.free >= g.total * utilisation]) < ways:
        detail = f"{facts}: an engine asks for {gib(budget)} at its start, and {busy.name} has {gib(busy.free)} free"
        remedy = (
            "end the process that holds the rest (`nvidia-smi`), or lower model.engine.gpu_memory_utilization"
        )
        return Finding("model memory", "problem", detail, remedy)
    left = budget - share - _OVERHEAD
    if left < 0.1 * budget:
        remedy = "raise model.engine.tensor_parallel_size, quantise, or lower model.engine.max_model_len"
        return Finding(
            "model memory", "note", f"{facts}: only about {gib(left)} left for the KV cache", remedy
        )
    return Finding("model memory", "ok", f"{facts}; about {gib(left)} each left for the KV cache")


def fits_ram(weights: int, memory: int, *, replicas: int) -> Finding:
    """CPU engines load the weights once each; `memory` of the machine in bytes."""
    kv = float(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or 0) * GIB
    need = replicas * (weights + kv)
    facts = f"{replicas} × {gib(weights)} of weights in {gib(memory)} of memory"
    if need > 0.9 * memory:
        remedy = "lower pool.replicas (or VLLM_CPU_KVCACHE_SPACE), or use a smaller or quantised model"
        return Finding("model memory", "problem", f"{facts}: too little", remedy)
    return Finding("model memory", "ok", facts)


def _power_of_two(most: int) -> int:
    return 1 << (most.bit_length() - 1)


# ── Tokenizer ───────────────────────────────────────────────────────────────────────────────────────────────────


def tokenizer_findings(model: ModelSettings, folder: Path | None) -> Iterator[Finding]:
    """Load the tokenizer where that needs no network. `folder`: the model's, local or in the hub cache."""
    place = folder
    if model.tokenizer:
        given = Path(model.tokenizer).expanduser()
        place = given if given.is_dir() else cached(model.tokenizer, model)
    if place is None:
        yield Finding(
            "tokenizer", "note", "not on this machine yet, so not tried", f"hf download {model.source}"
        )
        return
    local = model.model_copy(update={"source": str(place), "tokenizer": None, "revision": None})
    try:
        tokenizer = load_tokenizer(local)
    except ModelError as error:
        remedy = "put the model's tokenizer files beside config.json, or name them in model.tokenizer"
        yield Finding("tokenizer", "problem", one_line(str(error)), remedy)
        return
    chat = "with a chat template" if tokenizer.chat_template else "without a chat template (plain completion)"
    yield Finding("tokenizer", "ok", f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens, {chat}")
