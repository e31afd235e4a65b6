"""Why vLLM failed: its own error log, read back, because its exceptions only say "see root cause above".

An engine that dies, or does not start, does so in a child process; the parent learns a bare `EngineDeadError`, or
"Engine core initialization failed". The traceback goes to vLLM's logger in the child, so this module gives that logger
(by vLLM's own `VLLM_LOGGING_CONFIG_PATH`) a second handler: a file of this process's own, written on errors only. A
third one takes what vLLM says while it starts, which is where it tells how long loading and compiling took.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

_PREFIX = "dray-vllm-"
#: `pkg.SomeError: message`, the last line of a traceback.
_EXCEPTION_LINE = re.compile(r"^(?:\([^)]*\) )?([A-Za-z_][\w.]*(?:Error|Exception|Interrupt)): (.+)$")
#: Lines that only point at another line.
_POINTERS = (
    "root cause",
    "stack trace",
    "Engine core initialization failed",
    "background process",
    "EngineDeadError",
)


@cache
def error_log() -> Path | None:
    """The file that vLLM's errors of this process and its children go to; None if the user configures vLLM's logging.

    Has to be called before vLLM is imported. vLLM's console lines go to stderr, so that stdout stays the
    command's own; how many is up to `VLLM_LOGGING_LEVEL`.
    """
    given = os.environ.get("VLLM_LOGGING_CONFIG_PATH")
    # One of ours is a parent's, inherited with its environment: that file is no place for this process's errors.
    configured = given is not None and not Path(given).parent.name.startswith(_PREFIX)
    if configured or os.environ.get("VLLM_CONFIGURE_LOGGING") == "0":
        return None
    _sweep(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    atexit.register(_remove, folder, os.getpid())
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    log = folder / "errors.log"
    (folder / "logging.json").write_text(
        json.dumps(
            {
                "version": 1,
                "disable_existing_loggers": False,
                "formatters": {
                    "console": {
                        "class": "vllm.logging_utils.NewLineFormatter",
                        "format": "%(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s",
                        "datefmt": "%m-%d %H:%M:%S",
                    },
                    "plain": {"format": "%(message)s"},
                    "timed": {"format": "%(created).3f %(message)s"},
                },
                "handlers": {
                    "console": {
                        "class": "logging.StreamHandler",
                        "formatter": "console",
                        "level": level,
                        "stream": "ext://sys.stderr",
                    },
                    "errors": {
                        "class": "logging.FileHandler",
                        "formatter": "plain",
                        "level": "ERROR",
                        "filename": str(log),
                        "delay": True,
                    },
                    "starts": {
                        "class": "logging.FileHandler",
                        "formatter": "timed",
                        "level": "INFO",
                        "filename": str(log.with_name("starts.log")),
                        "delay": True,
                    },
                },
                "loggers": {
                    "vllm": {
                        "handlers": ["console", "errors", "starts"],
                        "level": level if level == "DEBUG" else "INFO",
                        "propagate": False,
                    },
                },
            }
        )
    )
    os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(folder / "logging.json")
    return log


def size(log: Path | None) -> int:
    """Bytes in the log so far: a place to read from later."""
    return log.stat().st_size if log is not None and log.exists() else 0


def reason_since(log: Path | None, offset: int) -> str | None:
    """The last exception that vLLM logged after `offset`, as one line `ValueError: …`; None if there is none."""
    if log is None or not log.exists():
        return None
    with log.open("rb") as file:
        file.seek(offset)
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        match = _EXCEPTION_LINE.match(line.strip())
        if match and not any(pointer in line for pointer in _POINTERS):
            return f"{match.group(1)}: {match.group(2)}"
    return None


#: Lines that vLLM 0.26 to 0.32 logs at INFO while it starts → what they tell. Those of each rank where there are several.
_ENGINE_IMPORTED = re.compile(r"^([\d.]+) Initializing a V1 LLM engine", re.MULTILINE)
_TOLD = {
    "weights_s": (r"Model loading took .* ([\d.]+) seconds", r"Loading weights took ([\d.]+) seconds"),
    "compile_s": (r"torch\.compile (?:took|takes) ([\d.]+) s in total", r"together took ([\d.]+) s in total"),
    "graphs_s": (r"Graph capturing finished in ([\d.]+) secs",),
}


def told_since(log: Path | None, offset: int) -> dict[str, float]:
    """What vLLM logged of a start after `offset` of `starts`: seconds by the names of `engine.StartParts`, and
    `engine_imported_at`, the Unix time at which EngineCore began. Only what is there.
    """
    if log is None or not log.exists():
        return {}
    with log.open("rb") as file:
        file.seek(offset)
        text = file.read().decode(errors="replace")
    told = {}
    for name, patterns in _TOLD.items():
        found = next((values for values in (re.findall(p, text) for p in patterns) if values), [])
        if found:
            told[name] = max(map(float, found))
    if match := _ENGINE_IMPORTED.search(text):
        told["engine_imported_at"] = float(match.group(1))
    return told


def starts(log: Path | None) -> Path | None:
    """Where what vLLM says of its starts goes, beside its error log."""
    return None if log is None else log.with_name("starts.log")


def _sweep(temporary: Path) -> None:
    """Remove what ended processes left: Ray ends its workers without running exit handlers.

    A day old and without its process, because another container's process may share the folder but not the pid.
    """
    for folder in temporary.glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).split("-")[0]
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > 86_400 and not Path("/proc", pid).exists():
                shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child runs the same exit handlers
        shutil.rmtree(folder, ignore_errors=True)
