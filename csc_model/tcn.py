"""A cheap temporal convolution network, with which a small model learns on a laptop."""

from torch import Tensor, nn

from csc_model.config import ModelConfig
from csc_model.trunk import Stack, Trunk


class TcnBlock(nn.Module):
    """A dilated convolution, a pointwise one and a residual, on `(batch, channel, frame)`."""

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__()
        dilation = 2 ** (depth % config.dilation_cycle)
        self.layers = nn.Sequential(
            nn.Conv1d(config.channels, config.hidden, 3, padding=dilation, dilation=dilation),
            nn.ReLU(),  # PReLU's gradient costs more than the convolution's on a CPU
            nn.GroupNorm(1, config.hidden),
            nn.Conv1d(config.hidden, config.channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Tcn(Trunk):
    """Blocks on frames as they come."""

    def stack(self, num_blocks: int) -> Stack:
        blocks = (TcnBlock(self.config, depth) for depth in range(num_blocks))
        return Stack(blocks, checkpointing=self.config.checkpointing)
