"""Words that a recogniser hears in signals. None is shipped: it is a function of the user's own."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CscError
from pipeline.extras import extra

WANTED = (
    "name a function that Python finds, here and on a cluster's nodes, of samples at 16 kHz, that "
    "returns their words, as package.module:function"
)
Floats = NDArray[np.float32]
Recogniser = Callable[[Floats], str]
"""Returns the words, between spaces, of samples `(time,)` at SAMPLE_RATE_HZ."""


def recogniser_named(name: str) -> Recogniser:
    """Return the function that `package.module:function` names.

    Raises:
        CscError: there is none, or jiwer is missing.
    """
    module, _, function = name.partition(":")
    try:
        found: Recogniser = getattr(import_module(module), function)
    except Exception as error:  # whatever somebody's module does when it is imported
        raise CscError(f"evaluate.recogniser {name}: {error}; {WANTED}") from error
    if not callable(found):
        raise CscError(f"evaluate.recogniser {name}: it is no function; {WANTED}")
    _jiwer()  # or it would be missed only where words are counted
    return found


def word_errors(recogniser: Recogniser, voice: Floats, heard: Sequence[Floats]) -> Floats:
    """Return how many words are recognised in a voice alone, then the errors in each signal.

    The voice's own words are the truth, so that no transcript is needed: an error is a word more, a
    word less, or another one than the same recogniser hears without anything else around.
    """
    truth, jiwer = recogniser(voice), _jiwer()
    found = [len(truth.split())]
    for signal in heard:
        words = recogniser(signal)
        if found[0]:
            told = jiwer.process_words(truth, words)
            found.append(told.substitutions + told.deletions + told.insertions)
        else:  # which jiwer refuses
            found.append(len(words.split()))
    return np.array(found, np.float32)


def _jiwer() -> Any:
    return extra("jiwer", "words", "evaluate.recogniser needs the package")
