"""Who may use an engine together: shards share it, a suspect has it alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """A lock with two sides, for one event loop. Shards that share go first: a suspect can wait until they are done,
    and takes nobody along when it kills the engine."""

    def __init__(self) -> None:
        self._sharing = 0
        self._alone = False
        self._change = asyncio.Condition()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Beside others that share."""
        async with self._change:
            await self._change.wait_for(lambda: not self._alone)
            self._sharing += 1
        try:
            yield
        finally:
            self._sharing -= 1
            await self._tell()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """With nobody beside."""
        async with self._change:
            await self._change.wait_for(lambda: not self._alone and not self._sharing)
            self._alone = True
        try:
            yield
        finally:
            self._alone = False
            await self._tell()

    async def _tell(self) -> None:
        async with self._change:
            self._change.notify_all()
