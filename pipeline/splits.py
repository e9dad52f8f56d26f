"""Speaker-disjoint splits: where a speaker goes, and the proof that none went to two places."""

from collections.abc import Sequence
from typing import Self

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from pipeline.errors import CscError
from pipeline.schema import SPLITS, Strict, stable_fraction

DISJOINT = ("speaker_id", "session_id", "recording", "utterance_id")


class SplitConfig(Strict):
    """Shares of speakers. A speaker's place depends on its id alone, so corpora may grow."""

    valid_share: float = Field(0.05, ge=0, lt=1)
    test_share: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _leaves_some(self) -> Self:
        if self.valid_share + self.test_share >= 1:
            raise ValueError("valid_share and test_share together leave nothing to train on")
        return self


def split_of(speaker: str, config: SplitConfig) -> str:
    """Return the split of a speaker id."""
    place = stable_fraction(f"split:{speaker}")
    if place < config.test_share:
        return "test"
    return "valid" if place < config.test_share + config.valid_share else "train"


def check_disjoint(catalogue: pa.Table, keys: Sequence[str] = DISJOINT) -> None:
    """Assert that no speaker, session, recording or content is in two splits.

    Raises:
        CscError: naming the first that is.
    """
    recording = pc.binary_join_element_wise(catalogue["corpus"], catalogue["path"], "/")
    table = catalogue.append_column("recording", recording)
    for key in keys:
        splits = table.group_by(key).aggregate([("split", "count_distinct"), ("split", "min")])
        torn = splits.filter(pc.greater(splits["split_count_distinct"], 1))
        if len(torn):
            raise CscError(
                f"{key} {torn[key][0].as_py()!r} is in more than one of the splits "
                f"{', '.join(SPLITS)}: give all its files the same split in the manifest"
            )
