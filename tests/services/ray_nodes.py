"""A real Ray cluster of several nodes on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Nodes:
    """Nodes that have one CPU each, so that each takes one server; the head takes none."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address = str(self._cluster.address)
        self.session = str(self._cluster.head_node.get_session_dir_path())
        """The folder of all that Ray writes."""
        self._nodes: list[Any] = []

    def add(self) -> None:
        """One more."""
        self._nodes.append(self._cluster.add_node(num_cpus=1))

    def lose(self) -> None:
        """The oldest, as when its power goes."""
        self._cluster.remove_node(self._nodes.pop(0), allow_graceful=False)

    def close(self) -> None:
        """End it, and this process's connection to it, if there is one."""
        import ray

        ray.shutdown()
        self._cluster.shutdown()


@contextmanager
def cluster() -> Iterator[Nodes]:
    """A cluster with its head alone."""
    nodes = Nodes()
    try:
        yield nodes
    finally:
        nodes.close()
