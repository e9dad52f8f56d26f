"""Ray Data runs shard tasks: one row of the plan is one shard is one task.

The only file of the pipeline that imports Ray: stages are given a runner. A task commits its shard
under a fixed name and returns nothing, so the object store stays empty.
"""

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import ray

from pipeline.errors import CscError
from pipeline.schema import OnProgress, Task, Work


def run_tasks(tasks: Sequence[Task], work: Work, on_progress: OnProgress, **needs: Any) -> None:
    """Do `work` on every task wherever Ray has what one of them needs.

    `needs` are Ray's: `num_cpus` (1 unless given), `num_gpus`, `memory` in bytes, `resources`.

    Raises:
        CscError: the first that a task raised; what other tasks committed by then counts.
    """
    if not tasks:
        return
    plan = pa.table({"task": [json.dumps(task) for task in tasks]})

    def run(row: dict[str, Any]) -> dict[str, Any]:
        try:
            work(json.loads(row["task"]))
        except (CscError, OSError) as error:  # as a row: exceptions of libraries may not unpickle
            return {"error": str(error)}
        return {"error": ""}

    dataset = ray.data.from_arrow(plan, override_num_blocks=len(tasks)).map(run, **needs)
    for done, row in enumerate(dataset.iter_rows(), start=1):
        if row["error"]:
            raise CscError(row["error"])
        on_progress(done, len(tasks))
