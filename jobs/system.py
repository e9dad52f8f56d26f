"""What a worker asks of its machine, under the names that MLflow shows as system metrics."""

import psutil
import torch

MEGABYTE = 1 << 20


def system_metrics(device: torch.device) -> dict[str, float]:
    """Return how busy this node is since the last call, and how full its memories are."""
    memory = psutil.virtual_memory()
    found = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system/system_memory_usage_percentage": memory.percent,
        "system/process_memory_megabytes": psutil.Process().memory_info().rss / MEGABYTE,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found["system/gpu_0_memory_usage_megabytes"] = (total - free) / MEGABYTE
        found["system/gpu_0_memory_usage_percentage"] = 100 * (1 - free / total)
    return found
