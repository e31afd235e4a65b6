"""A Ray cluster of several nodes on loopback, in a process of its own: `python -m tests.chaos.nodes WORKERS [DASHBOARD_PORT [HEAD_CPUS]]`.

Prints one JSON line with its address, its dashboard's (empty without a port for it) and the raylet of each worker node; then takes `remove <raylet pid>` on stdin and
answers each with a line. Ends with its stdin. The head holds one CPU unless told otherwise, for the stages around the
engines; a worker node has three, room for one engine of two and for those stages.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from typing import Any


def main(workers: int, dashboard_port: int | None = None, head_cpus: int = 1) -> None:
    from ray._private import ray_constants
    from ray._private.utils import write_ray_address
    from ray.cluster_utils import Cluster

    each: dict[str, Any] = {"node_ip_address": "127.0.0.1", "object_store_memory": 80 * 2**20}
    folder = tempfile.mkdtemp(prefix="dray-nodes-")
    if dashboard_port is not None:
        # Ray gives a submitted job the address in this folder's `ray_current_cluster`; in the folder that all clusters
        # of a machine share, it is that of the cluster that was started last.
        each["temp_dir"] = folder
    head = {"num_cpus": head_cpus, "include_dashboard": dashboard_port is not None, **each}
    if dashboard_port is not None:
        head |= {"dashboard_host": "127.0.0.1", "dashboard_port": dashboard_port}
        # Its usual port may be held by an agent that a killed cluster left: jobs would find "no available agent".
        head |= {"dashboard_agent_listen_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    if dashboard_port is not None:
        write_ray_address(cluster.address, folder)
    # One engine of two CPUs, and what stands beside engines: the node that is left must have room for both.
    # Each unpacks what a job ships into a folder of its own: nodes of one machine would replace each other's.
    nodes = [
        cluster.add_node(num_cpus=3, runtime_env_dir_name=f"runtime_resources_{number}", **each)
        for number in range(workers)
    ]
    by_raylet = {node.all_processes[ray_constants.PROCESS_TYPE_RAYLET][0].process.pid: node for node in nodes}
    dashboard = f"http://127.0.0.1:{dashboard_port}" if dashboard_port is not None else ""
    known = {"address": cluster.address, "dashboard": dashboard, "raylets": list(by_raylet)}
    print(json.dumps(known), flush=True)
    for line in sys.stdin:
        verb, _, pid = line.strip().partition(" ")
        if verb == "remove":
            cluster.remove_node(by_raylet.pop(int(pid)))
        print("done", flush=True)
    cluster.shutdown()  # type: ignore[no-untyped-call]
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
