"""What a model is asked to make of prompts: texts, or numbers about them.

generate   a text for each prompt (`sampling` says how)
score      the log-probability of each of the prompt's own tokens
embed      one vector for each prompt            ┐ vLLM's pooling runner
classify   the probability of each class         ┘
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.settings import SamplingSettings


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of request, with what vLLM's PoolingParams says of it."""

    name: Literal["generate", "score", "embed", "classify"] = "generate"
    dimensions: int | None = None
    """Only for `embed`: the first so many, of a Matryoshka model."""
    use_activation: bool | None = None
    """Only for `embed`: whether vectors are scaled to length 1; None: as the model has it."""

    @property
    def engine(self) -> Literal["generate", "embed", "classify"]:
        """Which kind of engine does it. One that generates also scores; vLLM pools for one task in one engine."""
        return "generate" if self.name == "score" else self.name

    @property
    def pools(self) -> bool:
        """Whether vLLM's pooling runner does it."""
        return self.engine != "generate"


GENERATE = Task()
#: The sampling where nothing is sampled: a request takes one step, and equal prompts give equal numbers.
UNSAMPLED = SamplingSettings(temperature=0.0, max_tokens=1)
