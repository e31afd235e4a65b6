"""Control plane: what a job is, planning, running, reports and the command line.

from jobs import load, plan, run

job = load("conf/jobs/demo.yaml", ["sampling.temperature=0"])
print(plan(job).summary)
report = run(job)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.loading import LoadedJob, load
    from jobs.proposal import Proposal
    from jobs.proposal import propose as plan
    from jobs.report import Report
    from jobs.retry import retry_failed
    from jobs.runner import Progress, run

__all__ = ["LoadedJob", "Progress", "Proposal", "Report", "load", "plan", "retry_failed", "run"]

#: Imported on first use: `dray --help` should not wait for Ray (1.9 s of the 4.4 s that all of it takes).
_HOME = {
    "LoadedJob": ("jobs.loading", "LoadedJob"),
    "Progress": ("jobs.runner", "Progress"),
    "Proposal": ("jobs.proposal", "Proposal"),
    "Report": ("jobs.report", "Report"),
    "load": ("jobs.loading", "load"),
    "plan": ("jobs.proposal", "propose"),
    "retry_failed": ("jobs.retry", "retry_failed"),
    "run": ("jobs.runner", "run"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(importlib.import_module(module), attribute)
