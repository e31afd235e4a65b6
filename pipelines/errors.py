"""Everything that can go wrong, named for what the reader of the message can do about it.

    DrayError
    ├── BadInput            the user's file, key, path or credentials: exit code 2, nothing was started
    │   ├── SpecError       the job file: names file, key, what was given, what is allowed
    │   ├── InputError      the input path or a file of it
    │   ├── OutputError     the output path: not writable, another job's, inside the input
    │   │   └── PartDamaged     a part that cannot be read as one; `dray verify --repair` moves it away
    │   ├── StorageError    a store that refuses us: credentials, bucket, permissions
    │   │   └── StorageDenied   it forbids this request; others it may allow
    │   └── ModelError      the model source: not there, not a model, unknown engine arguments
    ├── RowError            one row: recorded in its part as `error_code` and `error_message`, counted
    ├── ShardError          one shard: tried again up to `errors.max_attempts`
    │   ├── TransientStorageError   a store that did not answer in time, or answered 5xx, after our own retries
    │   ├── EngineDied              the engine under the shard's requests is gone, or hangs
    │   ├── WorkerDied              a stage's process died of this shard again and again
    │   └── Stopped                 not run, or not finished: the run was asked to stop
    └── JobError            the whole job stops: exit code 1, committed work stays
        ├── StorageFull             a disk or a quota is used up
        ├── EngineStartError        the engine cannot start
        ├── EngineBroken            engine after engine dies of whatever it is given
        ├── ErrorBudgetSpent        more failed rows than `errors.max_error_rate` allows
        ├── JobIncomplete           planned shards without a part after all attempts
        ├── OutputLocked            another driver writes this output
        ├── CodeMismatch            a worker runs other code than the driver
        └── Interrupted             SIGINT or SIGTERM: exit code 130

Any other exception in user code or in a prompt template is that row's error; of a dependency it is what `scopes` says:
the shard's, unless the table knows better (design §5).
"""

from __future__ import annotations

from typing import ClassVar


class DrayError(Exception):
    """Base of all errors that Dray raises on purpose; `exit_code` is what the command line returns."""

    exit_code: ClassVar[int] = 1


class BadInput(DrayError):
    """The user can mend it before anything runs."""

    exit_code = 2


class SpecError(BadInput):
    """A key of the job file or an override."""


class InputError(BadInput):
    """The input path, or a file that it names."""


class OutputError(BadInput):
    """The output path cannot be used for this job."""


class PartDamaged(OutputError):
    """An object below `data/` that cannot be read as a part of this output."""


class StorageError(BadInput):
    """A store refuses: no credentials, no such bucket, no permission."""


class StorageDenied(StorageError):
    """A store forbids this one request: listing a folder, say, whose objects may be read."""


class ModelError(BadInput):
    """The model source or its engine arguments."""


class RowError(DrayError):
    """One row cannot be answered; `code` goes to the column `error_code`.

    Codes in use: see `ROW_ERROR_CODES`.
    """

    def __init__(self, code: str, message: str) -> None:
        # Lone surrogates, which Arrow cannot hold, come from user code.
        super().__init__(message.encode("utf-8", "replace").decode())
        self.code = code


#: code → what it means; the docs' table and the tests read this.
ROW_ERROR_CODES: dict[str, str] = {
    "missing_value": "a column that the prompt needs is null or absent in this row",
    "invalid_utf8": "a text column holds bytes that are not UTF-8",
    "invalid_row": "the line or record cannot be parsed, or a value does not fit its column's type",
    "prompt_error": "the template or the user's prompt function raised, or returned something that is no prompt",
    "bad_image": "an image of the prompt is missing, cannot be read, is no image or too large, or lies outside input.images_folder",
    "empty_prompt": "the prompt, or the answer that a `score` step is to score, has no tokens",
    "prompt_too_long": "the prompt leaves no room for an answer within max_model_len; of pooling models, it is longer than that",
    "invalid_request": "the engine refused the request's parameters or tokens",
    "request_timeout": "no answer within errors.request_timeout_s",
    "invalid_output": "the answer is not what `output_schema` or `structured_outputs` asks for, also after `repairs` tries",
    "engine_crash": "the engine died each time it ran this row, also with nothing beside it",
    "parse_error": "a `parse` step could not read the answer",
    "step_error": "the function of a `map` step raised, or returned other columns or types than the step adds",
    "prompt_crash": "the process died each time it made this row's prompt, also with nothing beside it",
}


class ShardError(DrayError):
    """One shard failed as a whole and may be tried again."""


class TransientStorageError(ShardError):
    """The store did not answer, or answered with a passing fault, after our own bounded retries."""


class EngineDied(ShardError):
    """The engine that answered this shard's requests is dead, or has answered nothing for too long."""


class WorkerDied(ShardError):
    """The process of a stage died of this shard more often than `errors.max_attempts` allows."""


class Stopped(ShardError):
    """The run was asked to stop before this shard was done; it waits for the next one."""


class JobError(DrayError):
    """The job stops; what is committed stays."""


class StorageFull(JobError):
    """A disk or a quota is used up: with more room the same command goes on."""


class EngineStartError(JobError):
    """The engine cannot start: the model does not load, or its arguments do not fit the device."""


class EngineBroken(JobError):
    """Engine after engine died of the first rows it was given: not the rows' fault."""


class ErrorBudgetSpent(JobError):
    """More failed rows than `errors.max_error_rate` allows."""


class LimitReached(JobError):
    """The job has used what `budget` allows it; it can be resumed with more."""


class JobIncomplete(JobError):
    """Planned shards have no part after `errors.max_attempts` attempts."""


class OutputLocked(JobError):
    """Another driver holds the output's lock, or took it from us."""


class CodeMismatch(JobError):
    """A worker imported other code than the driver runs."""


class Interrupted(JobError):
    """The user or the system asked to stop."""

    exit_code = 130
