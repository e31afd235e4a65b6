"""The job's model: is it there and whole, does its tokenizer load, and does it fit into the memory it will get."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.doctor_finding import GIB, Finding, gib, one_line
from jobs.doctor_gpu import Gpu
from jobs.places import is_url
from pipelines.errors import ModelError
from pipelines.settings import ModelSettings
from pipelines.storage import Storage
from pipelines.tokenizer import load_tokenizer

HUB_TIMEOUT_S = 5.0
#: Bytes of a parameter by safetensors' dtype names; the F8 family has one byte.
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
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
    index = _index(folder)
    problem = folder_problem(named, sizes, index, dummy=model.engine.get("load_format") == "dummy")
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
    sizes = {info.name: info.size for info in Storage(model.source, patience_s=5).list()}
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
    wrong = folder_problem(source, names, None, dummy=model.engine.get("load_format") == "dummy")
    counts = dict(info.safetensors.parameters) if info.safetensors else None
    found = wrong or Finding(
        "model", "ok", f"{source} is on the hub; every node downloads it at its first start"
    )
    return Place((found,), None, counts)


def cached(source: str, model: ModelSettings) -> Path | None:
    """The hub cache's snapshot of a model (or tokenizer), as far as its config.json is there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        for name in ("config.json", "tokenizer_config.json"):
            found = try_to_load_from_cache(
                source, name, cache_dir=model.engine.get("download_dir"), revision=model.revision
            )
            if isinstance(found, str):
                return Path(found).parent
    except HFValidationError:
        pass  # no hub id; `_on_hub` says so
    return None


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


def weight_files(sizes: Mapping[str, int], index: Mapping[str, Any] | None) -> list[str]:
    """The safetensors files that count: some repositories hold the same weights twice."""
    if index:
        return sorted(set(index["weight_map"].values()))
    if "model.safetensors" in sizes:
        return ["model.safetensors"]
    return sorted(name for name in sizes if name.endswith(".safetensors"))


def _index(folder: Path) -> Any:
    path = folder / "model.safetensors.index.json"
    return json.loads(path.read_text()) if path.exists() else None


def count_parameters(files: Sequence[Path]) -> dict[str, int] | None:
    """dtype → number of parameters, from safetensors headers; None without such files.

    Format: 8 bytes of length (little endian), then JSON: https://huggingface.co/docs/safetensors. Raises ModelError
    for a file that is cut short or is no safetensors file.
    """
    counts: dict[str, int] = {}
    for path in files:
        for tensor in _header(path).values():
            counts[tensor["dtype"]] = counts.get(tensor["dtype"], 0) + math.prod(tensor["shape"])
    return counts or None


def _header(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if start == b"version ":  # of a Git LFS pointer
            raise ModelError(
                f"{path} is a Git LFS pointer, not the weights themselves: run `git lfs pull` there"
            )
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise ModelError(f"{path} is no whole safetensors file ({size:,} bytes)")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size < end:
        raise ModelError(f"{path} is cut short: {size:,} of {end:,} bytes")
    return header


# ── Memory ──────────────────────────────────────────────────────────────────────────────────────────────────────


def weights_in_memory(parameters: Mapping[str, int], engine: Mapping[str, Any]) -> int:
    """Bytes of the weights once vLLM has loaded them, over all GPUs.

    vLLM casts 32-bit checkpoints to 16 bits unless `dtype` says float32 (vllm/config/model.py). `quantization: fp8`
    halves 16-bit weights while loading; any other method named for an unquantised checkpoint counts as four bits.
    """
    wide = 4 if str(engine.get("dtype")) in ("float32", "float") else 2
    quantization, quantised = (
        engine.get("quantization"),
        any(name.startswith(("F8", "I", "U")) for name in parameters),
    )
    if quantization and not quantised:
        wide_bytes = 1.0 if "fp8" in str(quantization) else 0.5
        return int(sum(parameters.values()) * wide_bytes)
    total = 0
    for name, count in parameters.items():
        floating = name in ("F64", "F32", "F16", "BF16")
        total += count * (wide if floating else _BYTES.get(name, 1))
    return total


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
