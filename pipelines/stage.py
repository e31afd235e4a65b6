"""What the three stages share: the row that carries a shard from one to the next, and failures as data.

Ray Data aborts a dataset on an exception, or drops the block silently (`max_errored_blocks`). So a stage never raises:
it sends a `Failure` along in the shard's row, later stages pass it on, and the driver decides.
"""

from __future__ import annotations

import json
import traceback
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import pyarrow as pa

from pipelines import errors
from pipelines.contracts import Shard, pack, unpack
from pipelines.errors import DrayError, JobError
from pipelines.scopes import scope_of

StageName = Literal["prepare", "generate", "between", "commit"]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a shard has no part."""

    stage: StageName
    scope: Literal["shard", "job"]
    kind: str
    """Name of the exception's class."""
    message: str
    trace: str = ""
    """Traceback, for the log."""

    @classmethod
    def of(cls, stage: StageName, error: BaseException) -> Failure:
        # One row's failure that nobody laid on its row is the shard's.
        scope: Literal["shard", "job"] = "job" if scope_of(error) == "job" else "shard"
        message = str(error).strip() or repr(error)
        trace = "".join(traceback.format_exception(error))
        return cls(stage=stage, scope=scope, kind=type(error).__name__, message=message, trace=trace)

    def to_error(self) -> DrayError:
        """The error again, on the driver: with its own class (and exit code) where that is one of Dray's."""
        kind = getattr(errors, self.kind, None)
        return kind(self.message) if kind else JobError(f"{self.stage}: {self.kind}: {self.message}")


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """A shard on its way through the stages; one row of the Ray dataset."""

    shard: Shard
    rows: pa.Table | bytes | None = None
    """The input columns of the part, then `row_id`, later all records; bytes (packed) where a stage only passes them on."""
    prompts: pa.Table | None = None
    """`contracts.PROMPT_SCHEMA`."""
    generations: pa.Table | None = None
    """`contracts.GENERATION_SCHEMA`."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Counts and times for the shard's statistics, JSON values only."""
    failure: Failure | None = None

    @staticmethod
    def row(shard: Shard, **notes: Any) -> dict[str, str]:
        """A bare shard as a row for the first stage."""
        return {"shard": shard.to_json(), "notes": json.dumps(notes)}

    def failed(self, failure: Failure) -> Parcel:
        """The same shard without its rows: nothing downstream needs them."""
        return Parcel(shard=self.shard, notes=self.notes, failure=failure)

    def noting(self, **notes: Any) -> Parcel:
        return replace(self, notes={**self.notes, **notes})

    def to_batch(self) -> pa.Table:
        """One row of `PARCEL_SCHEMA`."""
        rows = pack(self.rows) if isinstance(self.rows, pa.Table) else self.rows
        return pa.table(
            {
                "shard": [self.shard.to_json()],
                "rows": [rows],
                "prompts": [None if self.prompts is None else pack(self.prompts)],
                "generations": [None if self.generations is None else pack(self.generations)],
                "notes": [json.dumps(self.notes)],
                "failure": [None if self.failure is None else json.dumps(asdict(self.failure))],
            },
            schema=PARCEL_SCHEMA,
        )

    @classmethod
    def from_batch(cls, batch: pa.Table) -> Parcel:
        """Read a one-row batch; missing columns (a bare shard) stay empty."""

        def cell(name: str) -> Any:
            return batch.column(name)[0] if name in batch.column_names else pa.scalar(None)

        def table(name: str) -> pa.Table | None:
            value = cell(name)
            return unpack(value.as_buffer()) if value.is_valid else None

        failure = cell("failure").as_py()
        rows = cell("rows")
        return cls(
            shard=Shard.from_json(cell("shard").as_py()),
            rows=rows.as_py() if rows.is_valid else None,
            prompts=table("prompts"),
            generations=table("generations"),
            notes=json.loads(cell("notes").as_py() or "{}"),
            failure=Failure(**json.loads(failure)) if failure else None,
        )


PARCEL_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string()),
        pa.field("rows", pa.large_binary()),
        pa.field("prompts", pa.large_binary()),
        pa.field("generations", pa.large_binary()),
        pa.field("notes", pa.string()),
        pa.field("failure", pa.string()),
    ]
)
