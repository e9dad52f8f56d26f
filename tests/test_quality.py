"""PESQ and STOI: better after separation that works, the same without, and a package missing."""

import sys

import numpy as np
import pytest
import torch

from csc_model.model import CSC
from jobs.quality import measures, quality
from pipeline.errors import CscError
from pipeline.sides import Side
from tests.conftest import voice
from tests.small_models import small

pytest.importorskip("pesq", reason="csc[quality] is not installed")


class Knows(CSC):
    """A separator that was told the voices, in an order of its own."""

    told: torch.Tensor

    def separate(self, *_: object) -> torch.Tensor:  # type: ignore[override]
        return self.told.flip(0)


def side(first: int, second: int) -> Side:
    voices = np.stack([voice(first, 0, 3.0), voice(second, 0, 3.0)])
    return Side(voices.sum(0), voices)


def test_a_voice_pulled_out_is_better_than_the_mixture() -> None:
    model, given = Knows(small("tcn", "stft")), side(1, 4)
    model.told = torch.from_numpy(given.voices)
    found = quality(model, [given], 2)
    assert found["stoi"]["separated"] == pytest.approx(1, abs=1e-3)
    assert found["pesq"]["separated"] > 4.5
    assert found["stoi"]["mixture"] < 0.95
    assert found["pesq"]["mixture"] < 3
    model.told = torch.from_numpy(np.stack([given.mixture] * 2))
    same = quality(model, [given], 2)
    for name in measures():
        assert same[name]["separated"] == pytest.approx(same[name]["mixture"], abs=1e-3)


def test_silence_is_left_out() -> None:
    silent = np.zeros(48_000, np.float32)
    assert np.isnan(measures()["pesq"](silent, silent))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pystoi", None)
    with pytest.raises(CscError, match=r"needs the package pystoi: pip install 'csc\[quality\]'"):
        measures()
