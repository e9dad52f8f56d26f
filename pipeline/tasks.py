"""Ray Data runs shard tasks: one row of the plan is one shard is one task.

The only file of the pipeline that imports Ray. A task writes its shard under a fixed name and
returns a few numbers, so next to nothing passes through Ray's object store.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray

from pipeline.schema import CscError, OnProgress

Task = Mapping[str, Any]
Work = Callable[[Task], Any]


def run_tasks(tasks: Sequence[Task], work: Work, on_progress: OnProgress) -> list[Any]:
    """Run `work` on every task (JSON in, JSON out), wherever Ray has CPUs; results in no order.

    Raises:
        CscError: the first that a task raised; the others are finished or abandoned by then, and
            what they committed counts.
    """
    if not tasks:
        return []
    plan = pa.table({"task": [json.dumps(task) for task in tasks]})

    def run(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"result": json.dumps(work(json.loads(row["task"]))), "error": ""}
        except CscError as error:  # a plain row: exceptions of libraries may not unpickle
            return {"result": "", "error": str(error)}

    results = []
    dataset = ray.data.from_arrow(plan, override_num_blocks=len(tasks)).map(run)
    for row in dataset.iter_rows():
        if row["error"]:
            raise CscError(row["error"])
        results.append(json.loads(row["result"]))
        on_progress(len(results), len(tasks))
    return results
