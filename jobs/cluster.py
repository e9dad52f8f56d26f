"""Starting or joining Ray, quietly."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jobs.config import Config
from pipeline.errors import CscError


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Have Ray for a while: started here and ended after, joined, or already there."""
    import ray

    if ray.is_initialized():
        yield
        return
    own: dict[str, Any] = {}
    if config.ray.address == "local":
        workers = config.train.workers * config.ray.workers.cpus
        own["num_cpus"] = max(os.cpu_count() or 1, math.ceil(workers))
        own["include_dashboard"] = False
    try:
        ray.init(address=config.ray.address, log_to_driver=False, logging_level="ERROR", **own)
    except (ConnectionError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CscError(f"no Ray at {config.ray.address}: {reason}; check ray.address") from error
    try:
        yield
    finally:
        ray.shutdown()
