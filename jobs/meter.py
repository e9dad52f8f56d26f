"""What training reports of itself: losses, and where the time of a step goes."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from csc_model import gather
from csc_model.objective import LARGEST, Losses

CPU = torch.device("cpu")
COMMUNICATION, DATA_WAIT = "communication", "data_wait_share"
Moment = float | torch.cuda.Event


class Work(NamedTuple):
    """What a step computes on one device."""

    flops: float  # floating point operations, backward pass included
    peak_flops: float | None  # that the device could do in a second, where that is known


class Meter:
    """Losses since the last line, and the share of the time that each phase takes.

    What ranks exchange is a phase of its own, as far as a rank waits for it: it is taken out of the
    phase that it lies in, and what hides behind a backward pass is not in it. There a rank waits
    for slower ones, too. On a GPU, which the host runs ahead of, its own clock times the phases.
    """

    def __init__(self, work: Work | None = None, device: torch.device = CPU) -> None:
        self.work, self.device = work, device
        self.began = time.perf_counter()
        self.mark = self._now()
        self.seconds, self.count = 0.0, 0
        self.spans: list[tuple[str, Moment, Moment]] = []
        self.exchanges: list[tuple[Moment, Moment]] = []  # since the mark
        self.unhidden_s = 0.0  # of exchanges of gradients, at the end of backward passes
        self.kept: dict[str, Tensor] = {}  # sums, or the largest, since the last line

    def _now(self) -> Moment:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, phase: str) -> None:
        """Count the time since the last call to a phase."""
        now = self._now()
        for first, last in self.exchanges:
            self.spans += [(phase, self.mark, first), (COMMUNICATION, first, last)]
            self.mark = last
        self.exchanges.clear()
        self.spans.append((phase, self.mark, now))
        self.mark = now

    @contextmanager
    def watching(self, wrapped: nn.Module) -> Iterator[None]:
        """See what ranks exchange before the forward pass that begins now, and in the losses."""
        before, gather.around_exchange = gather.around_exchange, self._exchange
        with ExitStack() as left:
            left.callback(setattr, gather, "around_exchange", before)
            if isinstance(wrapped, DistributedDataParallel):  # it brings buffers into line first
                first = self._now()
                hook = wrapped.module.register_forward_pre_hook(
                    lambda *_: self.exchanges.append((first, self._now()))
                )
                left.callback(hook.remove)
            yield

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        first = self._now()
        yield
        self.exchanges.append((first, self._now()))

    def exchanged(self, wrapped: nn.Module) -> None:
        """Ask DDP how long gradients were waited for when all of the last backward pass was done.

        To be called after something else has waited for the device: this does.
        """
        if not isinstance(wrapped, DistributedDataParallel) or wrapped.logger is None:
            return
        wrapped._set_ddp_runtime_logging_sample_rate(1)
        wrapped.logger.set_runtime_stats_and_log()  # else the next forward pass would
        told = wrapped._get_ddp_logging_data()
        hidden_ns = told["backward_compute_comm_overlap_time"]
        self.unhidden_s += (told["backward_comm_time"] - hidden_ns) / 1e9

    def stepped(self, losses: Losses, grad_norm: float, rate: float, seconds: float) -> None:
        """Count a step over `seconds` of audio, on all ranks together."""
        self.count, self.seconds = self.count + 1, self.seconds + seconds
        measured = losses._asdict() | {"grad_norm": grad_norm, "learning_rate": rate}
        for name, value in measured.items():
            known, value = self.kept.get(name), torch.as_tensor(value)
            joined = torch.maximum if name in LARGEST else torch.add
            self.kept[name] = value if known is None else joined(known, value)

    def line(self) -> dict[str, float]:
        """Return what is logged."""
        spent = time.perf_counter() - self.began
        means = {
            name: float(kept) / (1 if name in LARGEST else self.count)
            for name, kept in self.kept.items()
        }
        shares = {f"{phase}_share": taken / spent for phase, taken in self._spent().items()}
        speed = {
            "audio_seconds_per_s": self.seconds / spent,
            "step_s": spent / self.count,
        }
        if self.work is not None:
            speed["flops_per_s"] = self.work.flops * self.count / spent
            if self.work.peak_flops:
                speed["mfu"] = speed["flops_per_s"] / self.work.peak_flops
        return means | shares | speed

    def _spent(self) -> dict[str, float]:
        """Return the seconds of each phase."""
        spent = {COMMUNICATION: self.unhidden_s}
        if not isinstance(self.mark, float):
            self.mark.synchronize()
        for phase, first, last in self.spans:
            spent[phase] = spent.get(phase, 0.0) + _between_s(first, last)
        if self.unhidden_s:
            spent["backward"] -= self.unhidden_s
        return spent


def over_ranks(line: dict[str, float], device: torch.device) -> dict[str, float]:
    """Return a rank's line with the means of the losses, and the largest of what `LARGEST` names.

    The wait for data is the longest of any rank, too. All ranks take part. Other times stay this
    rank's. Of diagnostics, uneven shares make that mean uneven too.
    """
    world = gather.world_size()
    line = line | {"workers": float(world)}
    if world == 1:
        return line
    losses = torch.tensor([line[name] for name in Losses._fields], device=device)
    dist.all_reduce(losses)
    most = torch.tensor([line[name] for name in (*LARGEST, DATA_WAIT)], device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    means = dict(zip(Losses._fields, (losses / world).tolist(), strict=True))
    return line | means | dict(zip((*LARGEST, DATA_WAIT), most.tolist(), strict=True))


def _between_s(first: Moment, last: Moment) -> float:
    if isinstance(first, float) and isinstance(last, float):
        return last - first
    assert not isinstance(first, float)  # a meter has one clock
    assert not isinstance(last, float)
    return float(first.elapsed_time(last)) / 1000
