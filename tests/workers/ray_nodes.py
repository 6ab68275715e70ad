"""A Ray cluster of several nodes on this machine; takes orders on standard input.

Each order is one JSON line, and so is its answer. At the end of the input everything
is ended.
"""

import json
import os
import sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


class Nodes:
    """The nodes: a head, which is never removed, and others."""

    def __init__(self):
        import ray
        from ray.cluster_utils import Cluster

        self._ray = ray
        head = {"num_cpus": 1, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(address=self._cluster.address, log_to_driver=False)
        self._others = []

    def add(self):
        self._others.append(self._cluster.add_node(num_cpus=1, num_gpus=2))
        return self._others[-1].node_id

    def remove(self, id, politely):
        node = next(node for node in self._others if node.node_id == id)
        self._others.remove(node)
        self._cluster.remove_node(node, allow_graceful=politely)

    def address(self):
        return self._cluster.address

    def actors(self):
        return self._ray.util.list_named_actors(all_namespaces=True)

    def close(self):
        self._ray.shutdown()
        self._cluster.shutdown()


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    nodes = Nodes()
    try:
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            print(
                json.dumps(getattr(nodes, name)(*arguments)), file=answers, flush=True
            )
    finally:
        nodes.close()


if __name__ == "__main__":
    main()
