"""The faults: how each strikes, and what Dray may say to it. One function per fault; `FAULTS` has them all by name.

A fault sets its stage (`prepare`), starts drivers, strikes at a random moment and sees the run to its end. It raises
`Unexpected` when a driver ends in a way that is not allowed; the rows are judged afterwards, by the reader.
"""

from tests.chaos.faults import kills, nodes, storms, surroundings, rows  # noqa: F401, I001 - in the order of the table
from tests.chaos.faults.registry import FAULTS, Fault

__all__ = ["FAULTS", "Fault"]
