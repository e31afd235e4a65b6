"""vLLM's and torch's exceptions as the installed release raises them, without an engine; with one: test_vllm_engine."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest

from pipelines.errors import EngineStartError
from pipelines.scopes import SCOPES, listed, scope_of
from pipelines.settings import SamplingSettings
from pipelines.vllm_requests import check_requests, sampling_params

pytestmark = pytest.mark.timeout(240)


def _modules() -> list[ModuleType]:
    import vllm.exceptions
    import vllm.v1.engine.exceptions

    return [vllm.exceptions, vllm.v1.engine.exceptions]


def test_every_exception_of_vllm_has_a_scope_on_purpose() -> None:
    found = [
        kind
        for module in _modules()
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, BaseException)
    ]
    assert len(found) >= 6
    entries = [listed(kind) for kind in found]
    assert all(entry is not None and entry[0].startswith("vllm.") for entry in entries), entries


def test_every_entry_for_vllm_and_torch_exists() -> None:
    import torch

    known = {
        f"{k.__module__}.{k.__qualname__}"
        for m in [*_modules(), torch]
        for k in vars(m).values()
        if inspect.isclass(k)
    }
    # 0.26 lacks VLLM's three base classes and test_scopes has its own; every other name is in both ends of the range.
    assert [name for name in SCOPES if name.startswith(("vllm.", "torch.")) and name not in known] == []


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"top_p": 2.0},
        {"max_tokens": 0},
        {"n": 0},
        {"presence_penalty": 9.0},
        {"stop": [""]},
        {"stop_token_ids": ["a"]},
        {"logprobs": -2},
        {"min_tokens": -1},
        {"structured_outputs": {"json": "{}", "regex": "a"}},
    ],
)
def test_sampling_parameters_that_vllm_refuses(values: dict[str, Any]) -> None:
    """Of a request they would be its row's."""
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

    def make() -> None:
        if "structured_outputs" in values:
            StructuredOutputsParams(**values["structured_outputs"])
        SamplingParams(**values)

    with pytest.raises(Exception) as caught:  # noqa: PT011 -- whichever it is
        make()
    assert scope_of(caught.value, of_request=True) == "row", repr(caught.value)


def test_of_a_job_they_are_the_jobs() -> None:
    with pytest.raises(EngineStartError, match="sampling: temperature") as caught:
        sampling_params(SamplingSettings(temperature=99.0))
    assert scope_of(caught.value) == "job"


def test_what_would_end_the_engine_is_refused_of_a_job_as_of_a_row() -> None:
    class Letters:
        """A token for each letter."""

        max_token_id = 200

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return list(text.encode())

    many = SamplingSettings(stop_token_ids=list(range(101)), min_tokens=1)
    with pytest.raises(
        EngineStartError, match="sampling: 101 stop_token_ids; with min_tokens there may be 100"
    ):
        check_requests(sampling_params(many), Letters())
    long = SamplingSettings(bad_words=["ab" * 600])
    with pytest.raises(
        EngineStartError, match=r"sampling: bad_words of .* tokens; they may have 1024"
    ) as caught:
        check_requests(sampling_params(long), Letters())
    assert scope_of(caught.value) == "job"
    fine = SamplingSettings(stop_token_ids=list(range(101)), bad_words=["ab" * 200])
    check_requests(sampling_params(fine), Letters())


def test_out_of_memory_on_a_device_and_on_the_host() -> None:
    import torch

    assert scope_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")) == "shard"
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert scope_of(caught.value) == "shard"
