"""How one request is sampled: as the job says, as its row says, or otherwise because it is another try."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from pipelines.settings import MOST_TOKENS, SamplingSettings

#: Least temperature of another try: greedy decoding would only repeat itself.
REPAIR_TEMPERATURE = 0.5
#: Distinct settings that are remembered, with what engines make of each.
MOST_SETTINGS = 1024


def limit_again(max_tokens: int, cut: bool) -> int:
    """The limit of another try, behind one that was `cut` off at this one or not."""
    return min(2 * max_tokens, MOST_TOKENS) if cut else max_tokens


class RowSettings:
    """Of one generation's requests. Equal parameters give the same object, by which an engine knows what it has made of it."""

    def __init__(self, sampling: SamplingSettings) -> None:
        self._sampling = sampling
        self.of = lru_cache(MOST_SETTINGS)(self._of)
        """The settings of a row, by its `params` (`row_params.Own`), checked before; limit and seed travel apart."""
        self.again = lru_cache(MOST_SETTINGS)(self._again)
        """Those of another try at it, and whether that before was cut off at its limit."""

    def _of(self, params: str | None) -> SamplingSettings:
        if params is None:
            return self._sampling
        values: dict[str, Any] = json.loads(params)
        least, limit = values.get("min_tokens", 0), self._sampling.max_tokens
        if (
            limit is not None and least > limit
        ):  # then the row has a limit of its own, which comes with the request
            values["max_tokens"] = least
        return self._sampling.model_copy(update=values)

    def _again(self, params: str | None, cut: bool) -> SamplingSettings:
        own = self.of(params)
        return own.model_copy(
            update={
                "temperature": max(own.temperature, REPAIR_TEMPERATURE),
                "max_tokens": own.max_tokens and limit_again(own.max_tokens, cut),
            }
        )
