"""The task of `job.yaml` with distilabel, as its documentation has it: an OpenAI-compatible server answers."""

# with_distilabel.py BASE_URL INPUT_FOLDER OUTPUT_FILE
import json
import os
import sys

from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromFileSystem, StepInput, step
from distilabel.steps.tasks import TextGeneration

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
server, source, target = sys.argv[1:]


@step(inputs=["generation", "tasks"], outputs=["kind", "task", "novelty", "instruction"])
def parse(inputs: StepInput):
    for row in inputs:
        try:
            row["parsed"] = parsed = json.loads(row.pop("generation"))
            row |= parsed | novelty(row) | {"instruction": parsed["task"]}
        except (ValueError, TypeError):  # no answer, or one that was cut off
            row |= {"parsed": None, "kind": None, "task": None, "novelty": None, "instruction": ""}
    yield inputs


def llm(**sampling):
    return OpenAILLM(model="tiny", base_url=server, api_key="none", generation_kwargs=sampling)


with Pipeline(name="self-instruct", cache_dir=os.path.dirname(target)) as pipeline:
    load = LoadDataFromFileSystem(data_files=f"{source}/*.parquet", filetype="parquet", split="train")
    write = TextGeneration(
        name="write",
        llm=llm(max_new_tokens=120, temperature=1.0, extra_body={"structured_outputs": {"json": SCHEMA}}),
        template=TEMPLATE,
        columns=["tasks"],
    )
    solve = TextGeneration(
        name="solve",
        llm=llm(max_new_tokens=48, temperature=0.0),
        output_mappings={"generation": "solution"},
    )
    load >> write >> parse(name="parse") >> solve

if __name__ == "__main__":
    pipeline.run(use_cache=True)["default"]["train"].to_parquet(target)
