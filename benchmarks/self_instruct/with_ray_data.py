"""The task of `job.yaml` with Ray Data LLM, as its documentation has it: two processors, each with an engine."""

# with_ray_data.py MODEL INPUT_FOLDER OUTPUT_FOLDER
import json
import sys

import ray
from jinja2 import Template
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from examples.verifiers import novelty

TEMPLATE = """Here are some tasks:
{% for task in tasks %}
- {{ task }}
{%- endfor %}

Write one more, unlike these. First say which kind it is.
"""
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["question", "writing", "calculation", "conversion"]},
        "task": {"type": "string", "minLength": 1, "maxLength": 80},
    },
    "required": ["kind", "task"],
    "additionalProperties": False,
}
ENGINE = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "enforce_eager": True,
}
model, source, target = sys.argv[1:]
config = vLLMEngineProcessorConfig(
    model_source=model,
    engine_kwargs=ENGINE,
    concurrency=1,
    batch_size=64,
    log_engine_metrics=False,
    should_continue_on_error=True,
    placement_group_config={"bundles": [{"CPU": 0.5}]},
)


def ask_to_write(row):
    prompt = Template(TEMPLATE).render(tasks=row["tasks"])  # Jinja keeps compiled ones
    sampling = {"temperature": 1.0, "max_tokens": 120, "structured_outputs": {"json": SCHEMA}}
    return {**row, "messages": [{"role": "user", "content": prompt}], "sampling_params": sampling}


def parse(row):
    found = {"id": row["id"], "tasks": row["tasks"], "kind": "", "task": "", "novelty": 0.0}
    try:
        parsed = json.loads(row["generated_text"])
        return found | parsed | novelty({**found, "parsed": parsed})
    except (KeyError, ValueError, TypeError):  # no answer, or one that was cut off
        return found


def ask_to_solve(row):
    sampling = {"temperature": 0.0, "max_tokens": 48}
    return {**row, "messages": [{"role": "user", "content": row["task"]}], "sampling_params": sampling}


def solved(row):
    return {key: row.get(key) for key in ("id", "kind", "task", "novelty", "generated_text")}


if __name__ == "__main__":
    ray.init(
        address="local",
        num_cpus=16,
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        log_to_driver=False,
    )
    write = build_processor(config, preprocess=ask_to_write, postprocess=parse)
    solve = build_processor(config, preprocess=ask_to_solve, postprocess=solved)
    solve(write(ray.data.read_parquet(source))).write_parquet(target)
