"""The yardstick of its own kind: one dataset through `ray.data.llm`, as its documentation has it. Nothing of Dray is in it.

    python benchmarks/ray_data_llm.py TASK.json RESULT.json

TASK.json and RESULT.json are those of `bare_vllm.py`; `processor` goes to vLLMEngineProcessorConfig as it stands (batch_size,
max_concurrent_batches …; nothing in it: Ray's defaults). Rows are read, tokenised, answered and written by Ray Data, each row
with its own `sampling_params`. Differs from the documentation's example in `log_engine_metrics=False` (they need ray[serve]),
and on a CPU in a placement group of CPUs (Ray asks for a GPU otherwise), with 16 CPUs for Ray's books: its stages reserve one
each, and on two cores the listing of files would wait for ever for the actors of the stages behind it.

When an engine became ready is not said by Ray Data. The earliest arrival of a request at vLLM stands for it, by the metrics that
vLLM gives with each answer.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Do the whole task; one pass with its times."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import jinja2
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    # The workers' environment is this process's: the raylet is its child.
    ray.init(
        address="local",
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        log_to_driver=False,
        num_cpus=16 if task["device"] == "cpu" else None,
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)

    replicas = task["replicas"]
    config = vLLMEngineProcessorConfig(
        model_source=task["model"],
        engine_kwargs=dict(task["engine"]),
        concurrency=(replicas, replicas),
        chat_template_stage=task["chat"],
        log_engine_metrics=False,
        **({"placement_group_config": {"bundles": [{"CPU": 0.5}]}} if task["device"] == "cpu" else {}),
        **task["processor"],
    )
    sampling, limits, source = task["sampling"], task["max_tokens_column"], task["template"]
    chat = task["chat"]

    def before(row: dict[str, Any]) -> dict[str, Any]:
        prompt = jinja2.Template(source).render(row)  # Jinja keeps compiled templates
        own = {"max_tokens": int(row[limits])} if limits else {}
        asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        return {"id": row["id"], "sampling_params": {**sampling, **own}, **asked}

    def after(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": row["id"],
            "generated_text": row["generated_text"],
            "prompt_tokens": row["num_input_tokens"],
            "completion_tokens": row["num_generated_tokens"],
            "began_at": row["metrics"]["arrival_time"],
        }

    processor = build_processor(config, preprocess=before, postprocess=after)
    began = time.monotonic()
    output = Path(task["output"])
    processor(ray.data.read_parquet(task["input"])).write_parquet(str(output))
    whole_s = time.monotonic() - began
    parts = sorted(output.glob("*.parquet"))

    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    ready_at = min(pc.min(pq.read_table(part, columns=["began_at"])["began_at"]).as_py() for part in parts)
    written_at = max(part.stat().st_mtime for part in parts)
    ray.shutdown()
    return {
        "phases": {"dataset_s": whole_s},
        "passes": [
            {"variant": "", "ready_at": ready_at, "written_at": written_at, "output": list(map(str, parts))}
        ],
    }


if __name__ == "__main__":
    found = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(found))
