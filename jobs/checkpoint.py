"""Checkpoints without pickle: tensors in safetensors, the rest in JSON."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jobs.ema import Average
from pipeline.errors import CscError

BEST = "best"
LAST, OPTIMIZER, STATE = "last.safetensors", "optimizer.safetensors", "state.json"
AVERAGE = "average.safetensors"


class State(NamedTuple):
    """Where training stands: all that is not a tensor."""

    step: int
    best_step: int
    best_valid_eer: float  # nan where nobody's voice is learned
    averaged: int = 0  # updates of the running average
    best_improvement_db: float = -math.inf  # of SI-SNR, at the best step

    @classmethod
    def read(cls, folder: Path) -> Self:
        return cls(**json.loads((folder / STATE).read_text()))


def save_training(
    folder: Path,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    average: Average | None = None,
) -> None:
    """Write what a resumed run needs to go on as if nothing had happened."""
    save_file(_plain(objective.state_dict()), folder / LAST)
    moments = {
        f"{number}.{name}": torch.as_tensor(value)
        for number, slots in optimizer.state_dict()["state"].items()
        for name, value in slots.items()
    }
    save_file(_plain(moments), folder / OPTIMIZER)
    if average is not None:
        save_file(_plain(average.state), folder / AVERAGE)
        state = state._replace(averaged=average.updates)
    (folder / STATE).write_text(json.dumps(state._asdict()))


def load_training(
    folder: Path,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average | None = None,
) -> State:
    """Restore what `save_training` wrote, in place.

    Raises:
        CscError: it was written for a model of other shapes.
    """
    try:
        objective.load_state_dict(load_file(folder / LAST))
    except RuntimeError as error:
        raise CscError(
            f"the checkpoint in {folder} is of a model of other shapes ({_first_line(error)}): "
            "begin anew with --fresh, or go back to the version of the program that wrote it"
        ) from None
    state: dict[int, dict[str, Any]] = {}
    for key, value in load_file(folder / OPTIMIZER).items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    restored = State.read(folder)
    if average is not None:
        average.load(load_file(folder / AVERAGE), restored.averaged)
    return restored


def _first_line(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return lines[1] if len(lines) > 1 else lines[0]


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
