"""Exported models: the same answers in onnxruntime, for any batch and length."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csc_model.mel import LogMel
from csc_model.model import CSC
from csc_model.portable import OUTPUTS, RealLogMel, RealStft, export_onnx
from tests.small_models import small

CASES: dict[str, dict[str, Any]] = {
    "tcn": {},
    "blstm": {"speaker_features": "mel"},
    "conv_tasnet": {"speaker_features": "mel", "speaker_net": "ecapa", "ecapa_channels": 16},
}


def trained(trunk: str) -> CSC:
    """Return a model whose batch norms have seen something."""
    torch.manual_seed(0)
    model = CSC(small(trunk, "stft", **CASES[trunk]))
    model(torch.randn(4, 4000))
    return model.eval()


@given(st.integers(600, 3000), st.sampled_from([64, 100, 127]), st.sampled_from([255, 256]))
@settings(max_examples=30, deadline=None)
def test_convolutions_are_the_fourier_transform(num_samples: int, hop: int, size: int) -> None:
    waveform, window = torch.randn(2, num_samples), torch.hann_window(size)
    real = RealStft(window, hop)
    expected = torch.stft(
        waveform, size, hop, window=window, pad_mode="constant", return_complex=True
    )
    found = real.encode(waveform)
    assert torch.allclose(found, torch.view_as_real(expected).permute(0, 3, 1, 2), atol=1e-4)
    length = hop * (expected.shape[-1] - 1)
    back = real.decode(found, num_samples)
    assert torch.allclose(back[:, :length], waveform[:, :length], atol=1e-4)
    assert back.shape == waveform.shape


def test_mel_bands_are_the_same() -> None:
    mel, waveform = LogMel(80, 16_000), torch.randn(2, 5000)
    assert torch.allclose(RealLogMel(mel)(waveform), mel(waveform), atol=1e-4)


@pytest.mark.parametrize("trunk", CASES)
def test_onnxruntime_gives_what_the_model_gives(trunk: str, tmp_path: Path) -> None:
    model = trained(trunk)
    export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch, num_samples in ((1, 2000), (3, 16_000), (2, 4321)):
        waveform = torch.randn(batch, num_samples)
        found = session.run(list(OUTPUTS), {"waveform": waveform.numpy()})
        vectors, activity = model.embed(waveform)
        sources = torch.stack([model.separate(line) for line in waveform])
        for name, ours, theirs in zip(OUTPUTS, (sources, vectors, activity), found, strict=True):
            np.testing.assert_allclose(theirs, ours.numpy(), atol=1e-4, err_msg=name)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frontend conv with trunk galr cannot be exported"):
        export_onnx(CSC(small("galr", "conv")), tmp_path / "model.onnx")
