"""Where the chunks of an evaluation are embedded: in this process, or on Ray's processors."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

FEW_TASKS = 64  # that are sooner done by processors here than Ray would be ready


class Place(NamedTuple):
    """Who does a stage's tasks."""

    on_ray: bool
    num_gpus: int  # that each task asks Ray for; it then takes what its worker has


def place_of(num_tasks: int, gpus_here: int, gpus_of_ray: int) -> Place:
    """Return where tasks are soonest done.

    On GPUs of Ray where there is none here, or more than the one that this process would use and
    many tasks; else on the GPU here; else here if tasks are few, and on Ray's CPUs if many.
    """
    many = num_tasks > FEW_TASKS
    if gpus_of_ray and (not gpus_here or (many and gpus_of_ray > 1)):
        return Place(on_ray=True, num_gpus=1)
    return Place(on_ray=many and not gpus_here, num_gpus=0)


def gpus_for(nodes: Iterable[Mapping[str, Any]], resources: Mapping[str, float]) -> int:
    """Return how many GPUs live nodes (of `ray.nodes()`) have where a task can run at all."""
    able = [
        node["Resources"]
        for node in nodes
        if node["Alive"]
        and all(node["Resources"].get(name, 0) >= much for name, much in resources.items())
    ]
    return sum(int(has.get("GPU", 0)) for has in able)
