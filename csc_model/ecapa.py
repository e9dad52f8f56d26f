"""ECAPA-TDNN (Desplanques et al., 2020), the network that speaker verification is measured by.

Written from the paper, of any size: with 512 and 1024 channels it has the 6.2 and 14.7 million
parameters that are stated there.
"""

from typing import Self

import torch
from torch import Tensor, nn

from csc_model.attention import weighted_statistics
from csc_model.config import ModelConfig
from csc_model.mel import LogMel, unit_level
from csc_model.precision import full

SCALE = 8  # parts of a Res2Net convolution


class Convolution(nn.Sequential):
    """A convolution that keeps the length, ReLU and batch norm, in the paper's order."""

    def __init__(self, inner: int, outer: int, kernel: int = 1, dilation: int = 1) -> None:
        padding = dilation * (kernel // 2)
        super().__init__(
            nn.Conv1d(inner, outer, kernel, dilation=dilation, padding=padding),
            nn.ReLU(),
            nn.BatchNorm1d(outer),
        )


class Res2(nn.Module):
    """Convolutions on parts of the channels, each of which sees the part before it too."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        width = channels // SCALE
        self.parts = nn.ModuleList(Convolution(width, width, 3, dilation) for _ in range(SCALE - 1))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = x.chunk(SCALE, 1)
        made = [first]
        for convolution, part in zip(self.parts, others, strict=True):
            made.append(convolution(part if len(made) == 1 else part + made[-1]))
        return torch.cat(made, 1)


class Excitation(nn.Module):
    """Channels rescaled by what the whole recording has in them."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.Conv1d(channels, inner, 1), nn.ReLU(), nn.Conv1d(inner, channels, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean(-1, keepdim=True))


class Block(nn.Module):
    """SE-Res2Block."""

    def __init__(self, channels: int, dilation: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Convolution(channels, channels),
            Res2(channels, dilation),
            Convolution(channels, channels),
            Excitation(channels, inner),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Pooling(nn.Module):
    """Attentive statistics by channel, with mean and deviation of the recording as context."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.score = nn.Sequential(
            Convolution(3 * channels, inner), nn.Tanh(), nn.Conv1d(inner, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        exact = full(x)
        mean = exact.mean(-1, keepdim=True)
        deviation = (exact - mean).square().mean(-1, keepdim=True).clamp_min(1e-6).sqrt()
        context = torch.cat([x, mean.to(x).expand_as(x), deviation.to(x).expand_as(x)], 1)
        return weighted_statistics(x, self.score(context).softmax(-1))


class Ecapa(nn.Module):
    """Waveforms `(batch, time)` of any level to embeddings `(batch, dim)`.

    `wide` is what the three blocks are joined to, `inner` the bottleneck of attention and gates.
    """

    def __init__(
        self,
        sample_rate_hz: int,
        *,
        bands: int = 80,
        channels: int = 512,
        wide: int = 1536,
        inner: int = 128,
        dim: int = 192,
    ) -> None:
        super().__init__()
        self.mel = LogMel(bands, sample_rate_hz)
        self.first = Convolution(bands, channels, 5)
        self.blocks = nn.ModuleList(Block(channels, dilation, inner) for dilation in (2, 3, 4))
        self.joined = nn.Sequential(nn.Conv1d(3 * channels, wide, 1), nn.ReLU())
        self.pool = Pooling(wide, inner)
        self.embed = nn.Sequential(
            nn.BatchNorm1d(2 * wide), nn.Linear(2 * wide, dim), nn.BatchNorm1d(dim)
        )

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """Return the network of a model, in the paper's proportions."""
        return cls(
            config.sample_rate_hz,
            bands=config.mel_bands,
            channels=config.ecapa_channels,
            wide=3 * config.ecapa_channels,
            inner=config.ecapa_channels // 2,
            dim=config.embedding_dim,
        )

    def forward(self, waveform: Tensor) -> Tensor:
        _, unit = unit_level(waveform)
        x = self.first(self.mel(unit))
        outputs, total = [], x
        for block in self.blocks:  # each sees the sum of all before it
            outputs.append(block(total))
            total = total + outputs[-1]
        return self.embed(self.pool(self.joined(torch.cat(outputs, 1))))
