"""Gradients are weighed through a compiled model too."""

import torch
from torch import Tensor

from csc_model.balance import GradientBalance


class Hidden(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 3), torch.nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).sigmoid()).sigmoid()


def test_norms_are_measured_through_a_compiled_model_that_was_resumed() -> None:
    """The first backward pass of a process decides what a later one finds of the graph."""
    balance, trunk = GradientBalance(2), Hidden()
    trunk.compile(backend="aot_eager_decomp_partition")  # traced, not translated
    given = torch.randn(5, 4)
    trunk(given).sum().backward()
    hidden = trunk(given)
    balance([hidden.square().mean(), hidden.sin().mean()], trunk.parameters(), [1.0, 1.0])
    assert (balance.norms > 0).all()
