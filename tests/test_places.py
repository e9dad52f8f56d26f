"""Where chunks are embedded: a GPU before a CPU, here before Ray where that is sooner."""

import os
from pathlib import Path
from typing import Any

import pytest
import ray

from jobs.config import load_config
from jobs.places import FEW_TASKS, Place, gpus_for, place_of
from jobs.run import Run

FEW, MANY = FEW_TASKS, FEW_TASKS + 1
HERE, ON_CPUS, ON_GPUS = Place(False, 0), Place(True, 0), Place(True, 1)


@pytest.mark.parametrize(
    ("num_tasks", "gpus_here", "gpus_of_ray", "place"),
    [
        (FEW, 0, 0, HERE),
        (MANY, 0, 0, ON_CPUS),
        (FEW, 0, 1, ON_GPUS),  # a driver without a GPU uses the cluster's
        (MANY, 0, 4, ON_GPUS),
        (FEW, 1, 0, HERE),
        (MANY, 1, 0, HERE),  # one GPU here is faster than the CPUs of a cluster
        (MANY, 1, 1, HERE),
        (FEW, 1, 4, HERE),
        (MANY, 1, 4, ON_GPUS),
        (MANY, 4, 4, ON_GPUS),  # one process would use but one of those that are here
    ],
)
def test_tasks_go_where_they_are_soonest_done(
    num_tasks: int, gpus_here: int, gpus_of_ray: int, place: Place
) -> None:
    assert place_of(num_tasks, gpus_here, gpus_of_ray) == place


def test_gpus_count_where_a_task_can_run() -> None:
    nodes: list[dict[str, Any]] = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0, "data": 1.0}},
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0}},
        {"Alive": True, "Resources": {"CPU": 8.0, "data": 1.0}},
        {"Alive": False, "Resources": {"GPU": 8.0, "data": 1.0}},
    ]
    assert gpus_for(nodes, {}) == 6
    assert gpus_for(nodes, {"data": 0.01}) == 2
    assert gpus_for(nodes, {"other": 1.0}) == 0


def test_a_driver_without_a_gpu_asks_ray_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    told = tmp_path / "told"

    def work(task: dict[str, Any]) -> None:
        Path(task["to"]).write_text(f"{os.getpid()} {os.environ['CUDA_VISIBLE_DEVICES']}")

    quiet = {"include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", num_cpus=1, num_gpus=1, **quiet)  # as if there were one
    try:
        settings = [f"workspace='{tmp_path / 'work'}'", "ray.address='auto'"]
        with Run(load_config("demo", settings)) as run:
            run.here_or_on_ray("chunks")([{"to": str(told)}], work)
    finally:
        ray.shutdown()
    process, device = told.read_text().split()
    assert int(process) != os.getpid()
    assert device == "0"
