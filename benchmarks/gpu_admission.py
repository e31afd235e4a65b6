"""How requests are fed, on one GPU: a whole `run` with the wave policy against one with the continuous policy.

    python benchmarks/gpu_admission.py [--rows 8000] [--repetitions 2]

The model has the shape of Qwen2.5-0.5B and random weights (`load_format: dummy`), so nothing is downloaded: prompts of
256 tokens, answers of 160 tokens (`ignore_eos`). Only the admission policy differs. Rates are output tokens, counted in
the part files, over the time from the engine being ready to the last commit.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jobs import load, run  # noqa: E402

QWEN_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def model_folder(folder: Path) -> Path:
    """The shape above with the tiny model's tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN_05B))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples" / "tiny-model" / name, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--repetitions", type=int, default=2)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="dray-gpu-"))
    dice = random.Random(0)
    # The tokenizer keeps digits single: 255 of them and the BOS are 256 tokens.
    prompts = ["".join(dice.choices("0123456789", k=255)) for _ in range(options.rows)]
    pq.write_table(pa.table({"prompt": prompts}), work / "prompts.parquet")
    model = model_folder(work / "model")
    rates: dict[str, list[float]] = {"wave": [], "continuous": []}
    for repetition in range(options.repetitions):
        for policy, measured in rates.items():
            report = run(
                load(
                    {
                        "name": f"gpu-{policy}",
                        "input": {"path": str(work / "prompts.parquet")},
                        "prompt": {"prompt_column": "prompt", "chat": False},
                        "model": {
                            "source": str(model),
                            "engine": {"load_format": "dummy", "max_model_len": 1024, "max_num_seqs": 512},
                        },
                        "sampling": {"temperature": 0, "max_tokens": 160, "ignore_eos": True},
                        "output": {"path": str(work / f"out-{policy}-{repetition}")},
                        "pool": {"device": "gpu", "admission": {"policy": policy}},
                        "shards": {"rows": 1000},
                    }
                )
            )
            rate = report.output_tokens_per_s or 0.0
            measured.append(rate)
            print(
                f"{policy:10} {rate:9,.0f} output tokens/s, engine start {report.engine_start_s:.0f} s",
                flush=True,
            )
            device = report.engines[0]
    print(f"\n{device}, shape of Qwen2.5-0.5B, {options.rows} × (256 in, 160 out)")
    medians = {policy: statistics.median(measured) for policy, measured in rates.items()}
    for policy, measured in rates.items():
        print(f"{policy:10} median {medians[policy]:9,.0f}  ({min(measured):,.0f} – {max(measured):,.0f})")
    print(f"wave / continuous: {medians['wave'] / medians['continuous']:.2f}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
