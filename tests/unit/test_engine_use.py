"""Busy shares against a count of moments, how pools are told apart, and the GPUs that an engine has."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.engine_use import EngineUse, engine_use
from pipelines.answering import gpus_of
from pipelines.engine import EngineInfo
from pipelines.settings import ModelSettings, PoolSettings
from pipelines.shard_stats import Provenance, Turn


def part(*turns: tuple[str, str, int, int], run: str = "r") -> Provenance:
    made = tuple(Turn(generation=g, replica=r, began_at=b, ended_at=e) for g, r, b, e in turns)
    return Provenance(run_id=run, job="j", turns=made)


def test_a_pool_that_waits_is_less_busy() -> None:
    found = engine_use(
        [
            part(("", "a", 0, 6), ("judge", "b", 6, 8)),
            part(("", "a", 4, 10), ("judge", "b", 12, 14)),
        ]
    )
    assert found == (
        EngineUse(generations=("",), engines=1, busy=10 / 14),
        EngineUse(generations=("judge",), engines=1, busy=4 / 14),
    )


def test_engines_that_serve_several_generations_are_one_pool() -> None:
    found = engine_use(
        [part(("", "a", 0, 2), ("x", "a", 2, 4)), part(("", "b", 0, 1), ("x", "b", 1, 2)), part()]
    )
    assert found == (EngineUse(generations=("", "x"), engines=2, busy=6 / 8),)


def test_runs_are_added_up_and_the_time_between_them_is_not_idle() -> None:
    found = engine_use([part(("", "a", 0, 4)), part(("", "c", 1000, 1004), ("y", "d", 1004, 1008), run="s")])
    assert found == (
        EngineUse(generations=("",), engines=1, busy=8 / 12),
        EngineUse(generations=("y",), engines=1, busy=4 / 8),
    )
    assert engine_use([part()]) == ()


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=12
    )
)
def test_busy_time_is_counted_once(turns: list[tuple[str, int, int]]) -> None:
    (use,) = engine_use([part(("", engine, start, start + long)) for engine, start, long in turns])
    moments = {(engine, at) for engine, start, long in turns for at in range(start, start + long)}
    whole = max(s + n for _, s, n in turns) - min(s for _, s, _ in turns)
    engines = len({engine for engine, _, _ in turns})
    assert use.engines == engines
    assert use.busy == pytest.approx(len(moments) / (engines * whole))


@pytest.mark.parametrize(
    ("device", "packed", "tensor", "gpus"),
    [
        ("H200", 1, 1, 1.0),
        ("H200", 3, 1, 1 / 3),
        ("H200", 1, 4, 4.0),
        ("cpu", 3, 1, 0.0),
        ("H200", "auto", 1, None),
    ],
)
def test_an_engine_has_as_many_gpus_as_its_pool_gives_it(
    device: str, packed: Any, tensor: int, gpus: float | None
) -> None:
    info = EngineInfo(name="vllm", device=device, max_model_len=9, max_num_seqs=9, start_s=1.0, ready_at=2.0)
    model = ModelSettings(source="m", engine={"tensor_parallel_size": tensor})
    assert gpus_of(info, model, PoolSettings(engines_per_gpu=packed)) == gpus
