"""What a GPU did in a trace of torch's profiler: the share of the time in which a kernel ran, and of the kernels by kind."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

#: The first kind one of whose words is in a kernel's name, in lower case, has the kernel.
KINDS = {
    "attention": ("flash", "attn", "attention", "fmha"),
    "matrix products": ("gemm", "cutlass", "nvjet", "cublas", "splitk", "matmul", "_mm_"),
    "KV cache": ("reshape_and_cache", "cache"),
    "sampling": ("sample", "softmax", "topk", "top_k", "top_p", "argmax", "sort", "logit", "penalt"),
    "communication": ("nccl", "all_reduce", "allreduce", "all_gather"),
    "copies": ("memcpy", "memset", "copy"),
}


def kind_of(kernel: str) -> str:
    """Of a kernel, by its name; `other` holds norms, rotary embeddings, activations and what else is fused by the compiler."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")


def kernels(trace: Path) -> dict[str, Any]:
    """Of a gzipped Chrome trace: `seconds` from the first kernel's begin to the last one's end, `busy` (share of them in which one ran at
    least), `kinds` (share of all kernels' time, the largest first) and the ten longest kernels by name."""
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    found = [
        (event["ts"], event["ts"] + event["dur"], event["name"])
        for event in events
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    if not found:
        raise ValueError(f"{trace}: no kernel of a GPU is in it")
    found.sort()
    busy, reached = 0.0, found[0][0]
    kinds: dict[str, float] = defaultdict(float)
    names: dict[str, float] = defaultdict(float)
    for begin, end, name in found:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
        kinds[kind_of(name)] += end - begin
        names[name] += end - begin
    whole = sum(kinds.values())
    seconds = (reached - found[0][0]) / 1e6

    def shares(times: dict[str, float]) -> dict[str, float]:
        return {name: time / whole for name, time in sorted(times.items(), key=lambda each: -each[1])}

    return {
        "seconds": seconds,
        "busy": busy / 1e6 / seconds,
        "kernels": len(found),
        "kinds": shares(kinds),
        "longest": dict(list(shares(names).items())[:10]),
    }


def shown(trace: dict[str, Any]) -> str:
    """In lines for a terminal."""
    kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in trace["kinds"].items())
    lines = [
        f"GPU over {trace['seconds']:.2f} s: a kernel ran {trace['busy']:.1%} of the time; of the kernels' time: {kinds}"
    ]
    return "\n".join(lines + [f"  {share:6.1%}  {name[:150]}" for name, share in trace["longest"].items()])
