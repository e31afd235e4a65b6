"""How much of a GPU's peak a run used, by the two bounds of a roofline.

**Compute** (model FLOPs utilisation, as in PaLM, Chowdhery et al. 2022, appendix B): a token costs 2 N floating-point operations
in the matrices, with N the parameters that are multiplied (embedding look-up left out, output head counted), and
4 · layers · hidden · context in attention, for prompt and output tokens alike:

    MFU = (2 N · tokens + 4 · layers · (heads · head size) · Σ context) / seconds / (GPUs · peak FLOP/s)

**Memory** (Williams, Waterman, Patterson 2009, "Roofline"): a decode step reads all weights once, and each sequence in it reads its KV
cache once. With b sequences in flight, output tokens need at least

    bytes = output tokens / b · weight bytes + Σ over output tokens of context · KV bytes per token

so MBU = bytes / seconds / (GPUs · peak bytes/s). `b` is the most in flight: with fewer, more was read, so the share is a lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa


@dataclass(frozen=True)
class Peak:
    """Of one GPU; dense BF16, without sparsity."""

    flops: float
    bytes_per_s: float


#: By a part of the device's name; the first that fits. NVIDIA's data sheets; SXM modules unless PCIe is in the name.
PEAKS: dict[str, Peak] = {
    "H200": Peak(989e12, 4.8e12),
    "H100 PCIe": Peak(756e12, 2.0e12),
    "H100 NVL": Peak(835e12, 3.9e12),
    "H100": Peak(989e12, 3.35e12),
    "A100-SXM4-80GB": Peak(312e12, 2.039e12),
    "A100": Peak(312e12, 1.555e12),
    "L40S": Peak(362e12, 0.864e12),
    "L4": Peak(121e12, 0.3e12),
    "A10": Peak(125e12, 0.6e12),
}


def peak_of(device: str) -> Peak | None:
    """None for a device that is not in the table."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


@dataclass(frozen=True)
class Cost:
    """What a model's tokens cost."""

    matrix_parameters: int
    weight_bytes: int
    kv_bytes: int
    """Per token of context."""
    attention_flops: int
    """Per token of context that a token looks at."""

    @classmethod
    def of(cls, config: Mapping[str, Any], bytes_per_value: int = 2) -> Cost:
        """From a config.json of the Llama kind."""
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        head = config.get("head_dim") or hidden // heads
        attention = 2 * hidden * heads * head + 2 * hidden * kv_heads * head
        layer = attention + 3 * hidden * config["intermediate_size"]
        matrices = layers * layer + hidden * config["vocab_size"]
        return cls(
            matrix_parameters=matrices,
            weight_bytes=matrices * bytes_per_value,
            kv_bytes=2 * layers * kv_heads * head * bytes_per_value,
            attention_flops=4 * layers * heads * head,
        )

    def shares(
        self, lengths: pa.Table, seconds: float, peak: Peak, gpus: int, in_flight: int
    ) -> dict[str, float]:
        """`mfu` and `mbu`, from the `prompt_tokens` and `completion_tokens` of each row."""
        pairs = [
            (prompt, new)
            for prompt, new in zip(
                lengths["prompt_tokens"].to_pylist(), lengths["completion_tokens"].to_pylist(), strict=True
            )
            if new
        ]
        tokens = sum(prompt + new for prompt, new in pairs)
        output = sum(new for _, new in pairs)
        looked_at = sum((prompt + new) * (prompt + new + 1) / 2 for prompt, new in pairs)
        decoding = sum(new * prompt + new * (new + 1) / 2 for prompt, new in pairs)
        flops = 2 * self.matrix_parameters * tokens + self.attention_flops * looked_at
        read = output / in_flight * self.weight_bytes + decoding * self.kv_bytes
        return {
            "mfu": flops / seconds / (gpus * peak.flops),
            "mbu": read / seconds / (gpus * peak.bytes_per_s),
        }
