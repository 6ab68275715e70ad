"""Nodes of a Ray cluster for hosts: which one, what is taken of it, its actor.

Owns those choices. Invariant: they follow from what Ray lists and from where hosts are.
A host takes all accelerators of its node, since it could not share them with anybody,
and next to none of its processors, since Ray counts them but does not divide them.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardkit.cluster.ray_host import RayHost
from shardkit.cluster.settings import Settings

__all__ = ["make_actor", "pick_node", "take_resources"]

_ACCELERATORS = ("GPU", "TPU")
_PASSED_ON = (
    *("JAX_", "XLA_", "PJRT_", "LIBTPU_", "NCCL_", "TF_CPP_", "SHARDKIT_"),
    *("OMP_NUM_THREADS", "PYTHONPATH"),
)
"""How variables begin that nodes get from the launcher's environment."""


def pick_node(
    nodes: Sequence[Mapping[str, Any]],
    hosts: Mapping[str, int],
    resources: Mapping[str, float],
    *,
    shares: bool,
) -> Mapping[str, Any] | None:
    """Chooses a node for a host: one that is free and large enough.

    Args:
        nodes: All nodes, as Ray lists them.
        hosts: Node id → how many hosts are on it.
        resources: What a host needs.
        shares: Whether several hosts may be on one node.

    Example:
        >>> nodes = [
        ...     {"NodeID": "a", "Alive": True, "Resources": {"CPU": 4.0}},
        ...     {"NodeID": "b", "Alive": False, "Resources": {"CPU": 4.0}},
        ...     {"NodeID": "c", "Alive": True, "Resources": {"CPU": 4.0}},
        ... ]
        >>> pick_node(nodes, {"a": 1}, {"CPU": 1}, shares=False)["NodeID"]
        'c'
        >>> pick_node(nodes, {"a": 1, "c": 1}, {"CPU": 1}, shares=False) is None
        True
    """
    free = [
        node
        for node in nodes
        if node["Alive"]
        and (shares or not hosts.get(node["NodeID"]))
        and all(node["Resources"].get(k, 0) >= v for k, v in resources.items())
    ]
    return min(free, key=lambda node: hosts.get(node["NodeID"], 0), default=None)


def take_resources(
    node: Mapping[str, Any], resources: Mapping[str, float], num_hosts: int
) -> dict[str, float]:
    """Returns what a host takes of its node.

    Args:
        node: The node, as Ray lists it.
        resources: What it needs, and what it is to have if that is less than its share.
        num_hosts: How many hosts share the node.

    Example:
        >>> node = {"Resources": {"CPU": 64.0, "GPU": 8.0}}
        >>> take_resources(node, {"CPU": 0.01}, 1)
        {'GPU': 8.0, 'CPU': 0.01}
        >>> take_resources(node, {"CPU": 0.01}, 3)
        {'GPU': 2.0, 'CPU': 0.01}
    """
    there = node["Resources"]
    shares = {name: there.get(name, 0) // num_hosts for name in _ACCELERATORS}
    return {name: share for name, share in shares.items() if share} | dict(resources)


def make_actor(
    ray: Any,
    settings: Settings,
    host: str,
    *,
    name: str,
    namespace: str,
    node: str,
    ip: str,
    resources: Mapping[str, float],
) -> Any:
    """Starts a host on a node of Ray; returns its actor, which may not be there yet.

    Args:
        ray: The module, connected.
        settings: The cluster's.
        host: Which of its hosts.
        name: What the actor is called.
        namespace: In which namespace.
        node: The id of the node.
        ip: Where the host's agent listens.
        resources: What it takes of the node.
    """
    from ray.util.scheduling_strategies import (  # pyright: ignore[reportMissingImports]
        NodeAffinitySchedulingStrategy,
    )

    more = dict(resources)
    env = {k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON)}
    order = {
        "settings": settings.to_json(),
        "host": host,
        "ip": ip,
        "cwd": str(Path.cwd()),
        "env": env,
        # Ray gives an actor one thread; it is not the actor that computes.
        "unset": [] if "OMP_NUM_THREADS" in env else ["OMP_NUM_THREADS"],
    }
    actor = ray.remote(RayHost).options(
        num_cpus=more.pop("CPU", 0),
        num_gpus=more.pop("GPU", 0),
        resources=more,
        name=name,
        namespace=namespace,
        lifetime="detached",
        # A host that is lost waits for the supervisor, which may quarantine it.
        max_restarts=0,
        max_concurrency=8,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    )
    return actor.remote(json.dumps(order))
