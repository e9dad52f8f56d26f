"""How fast trunks train: our Conv-TasNet beside a published one, and each of ours by itself.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.trunk [--only same peer trunks] [--repeats 5]

Peer: pip install --no-deps asteroid asteroid-filterbanks huggingface-hub, which is enough to import
its networks. Where it is missing that is said, and its row is left out.

same: the largest difference between our masks and the peer's with the same weights, relative to the
largest mask (its norm adds 1e-8 to the variance, ours 1e-5).

peer: a training step (forward and backward) of a separator alone, on four mixtures of 2 s at
16 kHz: N 128, kernel 16, stride 8, B 64, H 128, X 4, R 2, two sources. Both have the same encoder
and decoder, ours; the peer's network (`TDConvNet`) stands between. `plain` is the paper's block
written layer by layer from torch's own: PReLU, gLN as GroupNorm, two convolutions out. The weights
of one residual convolution that nothing reads are what ours has less.

trunks: a training step and a forward pass of the whole model, two heads, on one mixture of 2 s at
16 kHz, by trunk: audio-seconds by second.

One thread, fp32. Times are CPU seconds of the process, so that others on the machine do not count;
medians of repeats after a first one, taken in turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from csc_model.config import TRUNKS, ModelConfig
from csc_model.encoder import build_frontend
from csc_model.model import CSC
from csc_model.trunk import build_trunk

PARTS = ("same", "peer", "trunks")
BATCH, SECONDS = 4, 2
SIZES = ModelConfig(
    trunk="conv_tasnet", num_bins=128, channels=64, hidden=128, shared_blocks=8, dilation_cycle=4
)
Masker = Callable[[Tensor], Tensor]
"""Turns a carrier `(batch, bin, frame)` into masks `(batch, slot, bin, frame)`."""


class Separator(nn.Module):
    """The encoder and decoder that all maskers share."""

    def __init__(self, masker: nn.Module) -> None:
        super().__init__()
        self.frontend, self.masker = build_frontend(SIZES), masker

    def forward(self, waveform: Tensor) -> Tensor:
        carrier = self.frontend.encode(waveform)
        slots = carrier.unsqueeze(1) * self.masker(carrier)
        return self.frontend.decode(slots.flatten(0, 1), waveform.shape[-1])


def around(stack: nn.Module) -> nn.Sequential:
    """Put the norm, the bottleneck and the masks around the blocks, as the model does."""
    bins, channels, slots = SIZES.num_bins, SIZES.channels, SIZES.num_slots
    return nn.Sequential(
        nn.GroupNorm(1, bins),
        nn.Conv1d(bins, channels, 1),
        stack,
        nn.PReLU(),
        nn.Conv1d(channels, slots * bins, 1),
        nn.Unflatten(1, (slots, bins)),
        nn.ReLU(),
    )


class PlainStack(nn.Module):
    """The paper's blocks with two convolutions out of each."""

    def __init__(self) -> None:
        super().__init__()
        channels, hidden = SIZES.channels, SIZES.hidden
        self.inner = nn.ModuleList()
        self.residual, self.skip = nn.ModuleList(), nn.ModuleList()
        for depth in range(SIZES.shared_blocks):
            d = 2 ** (depth % SIZES.dilation_cycle)
            self.inner.append(
                nn.Sequential(
                    nn.Conv1d(channels, hidden, 1),
                    nn.PReLU(),
                    nn.GroupNorm(1, hidden),
                    nn.Conv1d(hidden, hidden, 3, padding=d, dilation=d, groups=hidden),
                    nn.PReLU(),
                    nn.GroupNorm(1, hidden),
                )
            )
            self.residual.append(nn.Conv1d(hidden, channels, 1))
            self.skip.append(nn.Conv1d(hidden, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for inner, residual, skip in zip(self.inner, self.residual, self.skip, strict=True):
            h = inner(x)
            total = total + skip(h)
            x = x + residual(h)
        return total


def published() -> nn.Module | None:
    """Return asteroid's masker of the same sizes, or None where it is not installed."""
    try:
        from asteroid.masknn import TDConvNet
    except ImportError as error:
        print(f"  asteroid: missing ({error}), passed over")
        return None
    return TDConvNet(
        SIZES.num_bins,
        SIZES.num_slots,
        n_blocks=SIZES.dilation_cycle,
        n_repeats=SIZES.shared_blocks // SIZES.dilation_cycle,
        bn_chan=SIZES.channels,
        hid_chan=SIZES.hidden,
        skip_chan=SIZES.channels,
        norm_type="gLN",
        mask_act="relu",
    )


def take_weights(ours: nn.Sequential, peer: nn.Module) -> None:
    """Give ours the weights of the peer, whose two convolutions out of a block we hold as one."""
    theirs = list(peer.bottleneck.parameters())
    for block in peer.TCN:
        theirs += block.shared_block.parameters()
        outs = [block.skip_conv] if block is peer.TCN[-1] else [block.res_conv, block.skip_conv]
        theirs.append(torch.cat([out.weight for out in outs]))
        theirs.append(torch.cat([out.bias for out in outs]))
    theirs += peer.mask_net.parameters()
    with torch.no_grad():
        for weight, taken in zip(ours.parameters(), theirs, strict=True):
            weight.copy_(taken)


@torch.inference_mode()
def compare_outputs() -> None:
    ours, peer = around(build_trunk(SIZES).shared), published()
    if peer is None:
        return
    take_weights(ours, peer)
    carrier = torch.randn(2, SIZES.num_bins, 999).relu()
    expected = peer(carrier)
    difference = (ours(carrier) - expected).abs().max() / expected.abs().max()
    print(f"  largest difference of masks {float(difference):.1e}")


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def medians(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median of each, after a first run that does not count, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(1 + repeats):
        for name, work in works.items():
            times[name].append(cpu_seconds(work))
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def compare_with_the_published(repeats: int) -> None:
    maskers = {"ours": around(build_trunk(SIZES).shared), "plain": around(PlainStack())}
    peer = published()
    if peer is not None:
        maskers["asteroid"] = peer
    models = {name: Separator(masker) for name, masker in maskers.items()}
    waveform = torch.randn(BATCH, SECONDS * SIZES.sample_rate_hz)
    steps = {name: lambda m=m: m(waveform).square().mean().backward() for name, m in models.items()}
    found = medians(steps, repeats)
    for name, seconds in found.items():
        print(
            f"  {name:9} {weights(models[name]):8,} weights  {seconds:6.3f} s a step  "
            f"{seconds / found['ours']:5.2f} of ours"
        )


def measure_trunks(repeats: int) -> None:
    waveform = torch.randn(1, SECONDS * SIZES.sample_rate_hz)
    for trunk in TRUNKS:
        model = CSC(ModelConfig(trunk=trunk))

        def step(model: CSC = model) -> None:
            output = model(waveform)
            (output.sources.square().mean() + output.embeddings.square().mean()).backward()

        @torch.inference_mode()
        def forward(model: CSC = model) -> None:
            model(waveform)

        found = medians({"training": step, "forward": forward}, repeats)
        speeds = ", ".join(f"{name} {SECONDS / spent:6.2f}" for name, spent in found.items())
        print(f"  {trunk:12} {weights(model):9,} weights  audio-seconds by second: {speeds}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=5)
    told = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if "same" in told.only:
        print("same: the masks of both, with the same weights")
        compare_outputs()
    if "peer" in told.only:
        print(f"peer: a training step on {BATCH} mixtures of {SECONDS} s")
        compare_with_the_published(told.repeats)
    if "trunks" in told.only:
        print(f"trunks: one mixture of {SECONDS} s")
        measure_trunks(told.repeats)


if __name__ == "__main__":
    main()
