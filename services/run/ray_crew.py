"""`python -m vcot.services.run.ray_crew ADDRESS`: the process that has shards done by Ray Data; the client side's only Ray.

Model: an actor on each node takes one shard after another (services/run/sharding.py). What a lost node had is done by
another, as Ray does with any lost task: where its file is there already, nothing is asked. Keys go from the environment of
this process to the actors in a call, into their environment: neither Ray's log nor a file holds them.

Limits: actors take no share of the CPUs that Ray counts, since they mostly wait; the nodes have vcot and reach the storage.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from vcot.pipeline.errors import VcotError
from vcot.services.engine.ray_server import connect
from vcot.services.run.crew import Order, Told
from vcot.services.run.sharding import Fault, do_shard
from vcot.services.run.shared_storage import Storage

Batch = Mapping[str, Any]


class Desk:
    """The actor that every worker asks before a shard: the keys for it, or that nothing more is to be done."""

    def __init__(self) -> None:
        self._keys: dict[str, str] | None = None

    def open(self, keys: dict[str, str]) -> None:
        """Shards may be done."""
        self._keys = keys

    def close(self) -> None:
        """No more are."""
        self._keys = None

    def take(self) -> dict[str, str] | None:
        """The keys; None where nothing more is to be done."""
        return self._keys


class Worker:
    """On a node: does shards, one after another."""

    def __init__(self, storage: Storage, num_workers: int, desk: Any) -> None:
        self._storage, self._num_workers, self._desk = storage, num_workers, desk

    def __call__(self, batch: Batch) -> dict[str, list[str]]:
        """A batch of one name: the name again, and what kept it from being done; nothing where it was not begun."""
        import ray

        keys = ray.get(self._desk.take.remote())
        if keys is None:
            return {"name": [], "fault": []}
        os.environ.update(keys)
        (name,) = batch["name"]
        fault = do_shard(self._storage, str(name), self._num_workers)
        return {"name": [str(name)], "fault": [fault.model_dump_json() if fault else ""]}


def do_order(ray: Any, order: Order) -> Iterator[Told]:
    """Each shard as it is done; after a fault no other is begun."""
    desk = ray.remote(Desk).options(num_cpus=0, scheduling_strategy=_stay_here(ray)).remote()
    ray.get(desk.open.remote({key: os.environ[key] for key in order.keys if os.environ.get(key)}))
    try:
        for batch in _stream(ray, order, desk):
            for name, fault in zip(batch["name"], batch["fault"], strict=True):
                if fault:
                    ray.get(desk.close.remote())
                yield Told(name=str(name), fault=Fault.model_validate_json(fault) if fault else None)
    finally:
        ray.kill(desk)


def _stay_here(ray: Any) -> Any:
    """With this process, so that no other machine's end takes the keys."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _stream(ray: Any, order: Order, desk: Any) -> Iterator[Batch]:
    import ray.data as data

    data.DataContext.get_current().enable_progress_bars = False
    shards = data.from_items([{"name": name} for name in order.names], override_num_blocks=len(order.names))
    done = shards.map_batches(
        Worker,
        batch_size=1,
        fn_constructor_args=(Storage(order.url, order.folder), order.num_workers, desk),
        compute=data.ActorPoolStrategy(size=order.num_workers),
        num_cpus=0,
        scheduling_strategy="SPREAD",
    )
    yield from done.iter_batches(batch_size=None, prefetch_batches=0)


def look_at(ray: Any) -> Told:
    """The nodes that may work: those with CPUs, or else this one."""
    own = str(ray.util.get_node_ip_address())
    nodes = [
        str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0)
    ]
    return Told(nodes=tuple(nodes or [own]), own=own)


def main(address: str) -> None:
    """Answer on standard output, which nothing else gets; end with standard input."""
    out, orders = os.fdopen(os.dup(1), "w"), queue.SimpleQueue[str]()
    os.dup2(2, 1)

    def read() -> None:
        for line in sys.stdin:
            orders.put(line)
        os._exit(0)  # whatever is under way: Ray ends the workers of a process that is gone

    threading.Thread(target=read, daemon=True).start()

    def tell(told: Told) -> None:
        out.write(told.model_dump_json() + "\n")
        out.flush()

    try:
        ray = connect(address)
        tell(look_at(ray))
        while True:
            for told in do_order(ray, Order.model_validate_json(orders.get())):
                tell(told)
            tell(Told())
    except VcotError as error:
        tell(Told(fault=Fault.tell(error)))
    except Exception as error:
        tell(Told(fault=Fault(kind="ServerError", message=f"the Ray cluster did not do the shards ({_say(error)})")))
        raise


def _say(error: Exception) -> str:
    """The last line of what Ray says, which names the cause."""
    return str(error).strip().splitlines()[-1][:300] if str(error).strip() else type(error).__name__


if __name__ == "__main__":
    main(sys.argv[1])
