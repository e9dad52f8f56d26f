"""The model in real arithmetic and plain convolutions, as exchange formats know them (ONNX).

The same weights and answers: Fourier transforms become convolutions with sines and cosines.
"""

import copy
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csc_model.encoder import StftFrontEnd
from csc_model.mel import FLOOR, SPREAD, LogMel, unit_level
from csc_model.model import CSC

OPSET = 17
TRUNKS = ("tcn", "conv_tasnet", "blstm")
OUTPUTS = ("sources", "vectors", "activity")


class RealStft(nn.Module):
    """What `torch.stft` and `torch.istft` do, centred, as convolutions."""

    analysis: Tensor
    synthesis: Tensor
    squared: Tensor

    def __init__(self, window: Tensor, hop: int) -> None:
        super().__init__()
        size, self.hop = len(window), hop
        window = window.double()
        turns = torch.arange(size // 2 + 1)[:, None] * torch.arange(size) % size
        angle = 2 * torch.pi / size * turns.double()
        waves = torch.cat([angle.cos(), -angle.sin()])
        twice = torch.full((size // 2 + 1, 1), 2.0, dtype=torch.float64)
        twice[0] = 1  # bins that have no mirror image
        twice[-1] = 1 + size % 2
        back = waves * torch.cat([twice, twice]) / size
        self.register_buffer("analysis", (waves * window).float().unsqueeze(1))
        self.register_buffer("synthesis", (back * window).float().unsqueeze(1))
        self.register_buffer("squared", window.square().float().view(1, 1, -1))

    def encode(self, waveform: Tensor) -> Tensor:
        """Return real parts, then imaginary parts: `(batch, 2, bin, frame)` of `(batch, time)`."""
        half = self.analysis.shape[-1] // 2
        padded = F.pad(waveform, (half, half)).unsqueeze(1)
        return F.conv1d(padded, self.analysis, stride=self.hop).unflatten(1, (2, -1))

    def decode(self, parts: Tensor, num_samples: Tensor | int) -> Tensor:
        """Return `(batch, num_samples)` of `(batch, 2, bin, frame)`."""
        half = self.analysis.shape[-1] // 2
        added = F.conv_transpose1d(parts.flatten(1, 2), self.synthesis, stride=self.hop)
        ones = 0 * parts[:1, :1, 0] + 1  # as many as frames, which ones_like would fix
        weight = F.conv_transpose1d(ones, self.squared, stride=self.hop).clamp_min(1e-11)
        return (added / weight)[:, 0, half:][:, :num_samples]


class RealLogMel(nn.Module):
    """What `LogMel` does."""

    filters: Tensor

    def __init__(self, mel: LogMel) -> None:
        super().__init__()
        missing = mel.fft_size - len(mel.hann)
        window = F.pad(mel.hann, (missing // 2, missing - missing // 2))
        self.stft = RealStft(window, mel.hop)
        self.register_buffer("filters", mel.filters)

    def forward(self, waveform: Tensor) -> Tensor:
        """Turn `(batch, time)` into `(batch, band, frame)`."""
        power = self.stft.encode(waveform).square().sum(1)
        return torch.log(self.filters @ power + FLOOR) / SPREAD


class StatedLstm(nn.Module):
    """An LSTM in both directions, whose state of zeros is of the batch at hand when exported."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        state = (0 * x[:, 0, :1]).expand(-1, self.lstm.hidden_size).repeat(2, 1, 1)
        return self.lstm(x, (state, state))


class Portable(nn.Module):
    """A model on mixtures `(batch, time)` at its sample rate, longer than its window.

    Returns sources `(batch, slot, time)`, unit vectors `(batch, slot + 1, dim)`, the unseparated
    view last, and activity `(batch, slot + 1)`: what `CSC.separate` and `CSC.embed` do.

    Raises:
        ValueError: front end or trunk of the model cannot be expressed so.
    """

    def __init__(self, model: CSC) -> None:
        super().__init__()
        config = model.config
        if not isinstance(model.frontend, StftFrontEnd) or config.trunk not in TRUNKS:
            raise ValueError(
                f"frontend {config.frontend} with trunk {config.trunk} cannot be exported: lengths "
                f"are fixed in it; train with frontend=stft and a trunk of {', '.join(TRUNKS)}"
            )
        self.model = copy.deepcopy(model).eval()
        for block in list(self.model.modules()):
            lstm = getattr(block, "lstm", None)
            if isinstance(lstm, nn.LSTM):
                block.lstm = StatedLstm(lstm)
        self.stft = RealStft(model.frontend.hann, model.frontend.hop)
        holder = self.model.ecapa if config.speaker_net == "ecapa" else self.model
        if config.speaker_features == "mel":
            holder.mel = RealLogMel(holder.mel)  # type: ignore[assignment]

    def forward(self, waveform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        level, unit = unit_level(waveform)
        parts = self.stft.encode(F.pad(unit, (0, self.stft.hop - 1)))  # as `padded` does
        magnitude = parts.square().sum(1).sqrt()
        separated = self.model._masked(parts, magnitude)
        weighed = parts.unsqueeze(1) * separated.masks.unsqueeze(2)
        sources = self.stft.decode(weighed.flatten(0, 1), unit.shape[-1])
        sources = sources.unflatten(0, (-1, self.model.config.num_slots))
        embeddings, logits = self.model._speakers(unit, separated, sources)
        activity = torch.cat([logits.sigmoid(), 0 * logits[:, :1] + 1], 1)
        return sources * level.unsqueeze(1), self.model._alone(embeddings), activity


def export_onnx(model: CSC, to: Path) -> None:
    """Write a model as ONNX, for any batch and any length from its window on.

    Raises:
        ValueError: as `Portable` does.
    """
    batch_and_time = {0: "batch", 1: "time"}
    with warnings.catch_warnings():  # of the exporter about itself, and about sizes that are fixed
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Portable(model),
            (torch.randn(2, 2 * model.config.sample_rate_hz),),
            str(to),
            input_names=["waveform"],
            output_names=list(OUTPUTS),
            dynamic_axes={
                "waveform": batch_and_time,
                "sources": {0: "batch", 2: "time"},
                "vectors": {0: "batch"},
                "activity": {0: "batch"},
            },
            opset_version=OPSET,
            dynamo=False,  # the newer exporter unrolls recurrent layers
        )
