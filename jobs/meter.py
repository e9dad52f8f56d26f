"""What training reports of itself: mean losses, and where the time of a step goes."""

import time
from typing import NamedTuple

import torch
from torch import Tensor

from csc_model.objective import Losses


class Work(NamedTuple):
    """What a step computes on one device."""

    flops: float  # floating point operations, backward pass included
    peak_flops: float | None  # that the device could do in a second, where that is known


class Meter:
    """Means since the last line.

    On a GPU the host runs ahead of the device until a step's gradient norm is looked at: the share
    of a phase is then that of the host's time, and `step_s` that of both.
    """

    def __init__(self, work: Work | None = None) -> None:
        self.work = work
        self.began = self.mark = time.perf_counter()
        self.seconds, self.count = 0.0, 0
        self.spent: dict[str, float] = {}
        self.sums: dict[str, Tensor] = {}

    def passed(self, phase: str) -> None:
        """Count the time since the last call to a phase."""
        now = time.perf_counter()
        self.spent[phase] = self.spent.get(phase, 0.0) + now - self.mark
        self.mark = now

    def stepped(self, losses: Losses, grad_norm: float, rate: float, seconds: float) -> None:
        """Count a step over `seconds` of audio, on all ranks together."""
        self.count, self.seconds = self.count + 1, self.seconds + seconds
        measured = losses._asdict() | {"grad_norm": grad_norm, "learning_rate": rate}
        for name, value in measured.items():
            self.sums[name] = self.sums.get(name, torch.zeros(())) + value

    def line(self) -> dict[str, float]:
        """Return what is logged."""
        spent = time.perf_counter() - self.began
        means = {name: float(total) / self.count for name, total in self.sums.items()}
        shares = {f"{phase}_share": taken / spent for phase, taken in self.spent.items()}
        speed = {
            "audio_seconds_per_s": self.seconds / spent,
            "step_s": spent / self.count,
        }
        if self.work is not None:
            speed["flops_per_s"] = self.work.flops * self.count / spent
            if self.work.peak_flops:
                speed["mfu"] = speed["flops_per_s"] / self.work.peak_flops
        return means | shares | speed
