"""Which Ray is used, and what stages need of its nodes: the `[ray]` table of a configuration."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from pipeline.schema import Strict


class TaskNeeds(Strict):
    """What a task of ingest, build or evaluation needs of a node."""

    cpus: float = Field(1.0, gt=0)
    memory_gb: float = Field(0.0, ge=0, description="that must be free; 0: not asked for")
    resources: dict[str, float] = Field({}, description="as nodes are labelled: {data = 0.01}")

    def asked(self, gpus: float = 0) -> dict[str, Any]:
        """Return it in Ray's words."""
        needs: dict[str, Any] = {"num_cpus": self.cpus}
        if gpus:
            needs["num_gpus"] = gpus
        if self.memory_gb:
            needs["memory"] = self.memory_gb * 1e9
        return needs | ({"resources": self.resources} if self.resources else {})


class WorkerNeeds(Strict):
    """What a training worker needs of a node."""

    cpus: float = Field(1.0, gt=0)
    gpus: float | None = Field(
        None, ge=0, description="unset: one each, if the cluster has them already; 1: waits for it"
    )
    resources: dict[str, float] = Field(
        {}, description="as nodes are labelled: {gpu_node = 0.0625}"
    )
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"


class RayConfig(Strict):
    """Which Ray to use, and what each stage needs of its nodes."""

    address: str = Field("local", description="`local` starts one that ends with the command")
    tasks: TaskNeeds = TaskNeeds()
    workers: WorkerNeeds = WorkerNeeds()
    cache_gb: float = Field(
        20.0, ge=0, description="of remote mixture shards that a node keeps; 0: none"
    )
    cache_folder: str = Field("", description="for them; unset: the system's temporary folder")

    @field_validator("cache_folder")
    @classmethod
    def _same_for_all_processes(cls, folder: str) -> str:
        if folder and not Path(folder).is_absolute():
            raise ValueError(f"cache_folder {folder!r} is to be an absolute path on every node")
        return folder
