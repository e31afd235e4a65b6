"""How much is tried: what a minute holds by default, and `PROOF` times as much where that variable is set."""

import os

TIMES = int(os.environ.get("PROOF", "1"))
STORIES = 60 * TIMES
"""Stories that Hypothesis makes up."""
SEEDS = 20 * TIMES
"""Schedules of the protocol on each kind of store."""
