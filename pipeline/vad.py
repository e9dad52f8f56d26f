"""Voice activity by silero-vad's network, run on ONNX Runtime as it lies in their package.

The network that is used here takes many windows at a call and gives what the one that takes one
gives (https://github.com/snakers4/silero-vad).
"""

import functools
import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pipeline.audio import Samples

WINDOW = 512  # samples at 16 kHz that one probability speaks of
CONTEXT = 64  # samples before a window that the network wants to see


def network() -> Path:
    """Return where silero's package holds the network; importing it would load torch."""
    package = importlib.util.find_spec("silero_vad")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "data" / "silero_vad_16k_sequence.onnx"


@functools.cache
def _session() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(network(), options, providers=["CPUExecutionProvider"])


class VoiceActivity:
    """Gives the probability of speech for each window of one recording, as it comes in."""

    def __init__(self) -> None:
        self._hidden = self._cell = np.zeros((1, 1, 128), np.float32)
        self._context = np.zeros((1, CONTEXT), np.float32)

    def __call__(self, windows: Samples) -> NDArray[np.float32]:
        """Return probabilities `(window,)` of the next samples `(window, WINDOW)`."""
        before = np.concatenate([self._context, windows[:-1, -CONTEXT:]])
        self._context = windows[-1:, -CONTEXT:]
        told = {
            "input": np.concatenate([before, windows], axis=1),
            "h": self._hidden,
            "c": self._cell,
        }
        outputs = _session().run(["speech_probs", "hn", "cn"], told)
        probabilities, self._hidden, self._cell = outputs
        return np.asarray(probabilities, np.float32)
