"""ECAPA-TDNN against what its paper states, and as the speaker head of CSC."""

import pytest
import torch

from csc_model.ecapa import Ecapa
from csc_model.model import CSC
from tests.small_models import small


@pytest.mark.parametrize(("channels", "millions"), [(512, 6.2), (1024, 14.7)])
def test_it_has_the_parameters_of_the_paper(channels: int, millions: float) -> None:
    with torch.device("meta"):
        network = Ecapa(16_000, channels=channels)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_level_changes_nothing() -> None:
    torch.manual_seed(0)
    network, waveforms = (
        Ecapa(16_000, channels=16, wide=48, inner=8, dim=8).eval(),
        torch.randn(2, 8000),
    )
    torch.testing.assert_close(network(1e-2 * waveforms), network(waveforms))


def test_silence_has_a_gradient_that_is_a_number() -> None:
    waveforms = torch.zeros(2, 8000, requires_grad=True)
    network = Ecapa(16_000, channels=16, wide=48, inner=8, dim=8).eval()
    network(waveforms).square().sum().backward()
    assert waveforms.grad is not None
    assert torch.isfinite(waveforms.grad).all()


def test_a_view_is_heard_the_same_among_fewer() -> None:
    torch.manual_seed(0)
    config = small("tcn", "stft", speaker_features="mel", speaker_net="ecapa", ecapa_channels=16)
    model, waveforms = CSC(config).eval(), torch.randn(3, 4000)
    whole = model(waveforms)
    heard = torch.tensor([[0], [2], [1]])
    part = model(waveforms, heard)
    for row, (view,) in enumerate(heard.tolist()):
        torch.testing.assert_close(part.embeddings[row, view], whole.embeddings[row, view])
    assert (part.embeddings.square().sum(-1) > 0).sum() == len(heard)
    torch.testing.assert_close(part.sources, whole.sources)
