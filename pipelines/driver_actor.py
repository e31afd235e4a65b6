"""Small actors of the driver's, on its own node: they are gone only with it."""

from __future__ import annotations

from typing import Any

import ray


def beside_driver(actor: type, **options: Any) -> Any:
    """Start one, and give its handle. `options`: Ray's own."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(actor).options(num_cpus=0, scheduling_strategy=here, **options).remote()
