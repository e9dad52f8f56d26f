"""Recurrent layers over frames in both directions: of the trunks, what separates best on a CPU."""

from torch import Tensor, nn

from csc_model.config import ModelConfig
from csc_model.trunk import Stack, Trunk


class BlstmBlock(nn.Module):
    """A norm, an LSTM of `hidden` cells in both directions together, a projection, a residual.

    On `(batch, frame, channel)`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        cells = config.hidden // 2
        self.norm = nn.LayerNorm(config.channels)
        self.lstm = nn.LSTM(config.channels, cells, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(config.dropout)
        self.project = nn.Linear(2 * cells, config.channels)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.norm(x))
        return x + self.project(self.dropout(y))


class Blstm(Trunk):
    """Blocks on all frames in a row."""

    def stack(self, num_blocks: int) -> Stack:
        blocks = (BlstmBlock(self.config) for _ in range(num_blocks))
        return Stack(blocks, checkpointing=self.config.checkpointing)

    def split(self, frames: Tensor) -> Tensor:
        return frames.transpose(1, 2)

    def join(self, x: Tensor, num_frames: int) -> Tensor:  # noqa: ARG002 - others need the number
        return x.transpose(1, 2)
