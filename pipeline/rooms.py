"""The room responses of a dataset: few enough to lie on the training device as a whole."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import CscError
from pipeline.schema import ROOMS, stable_fraction
from pipeline.shards import iter_pcm
from pipeline.storage import Folder

MOST_RESPONSES = 2000  # of a split: 64 MB, where each is as long as a second


def rooms_of(store: Folder, catalogue: pa.Table) -> pa.Table:
    """Return the responses of `schema.ROOMS`, those of a room one after another.

    Where a split has more than MOST_RESPONSES, as many are taken, by a hash of what they are.

    Raises:
        CscError: the store has none.
    """
    rows = catalogue.filter(pc.equal(catalogue["kind"], "room"))
    if not len(rows):
        raise CscError(
            "build.mixing.room_share asks for rooms and no corpus of kind 'room' was ingested: "
            "add one, or set build.mixing.room_share=0"
        )
    keys = ("split", "speaker_id", "utterance_id")  # the speaker of a response is its room
    chosen = _taken(rows).sort_by([(key, "ascending") for key in keys])
    places = list(zip(*(chosen[name].to_pylist() for name in ("shard", "row")), strict=True))
    wanted: dict[int, set[int]] = {}
    for shard, row in places:
        wanted.setdefault(shard, set()).add(row)
    # Copies: a view would keep all of its row group.
    pcm = {place: samples.copy() for place, samples in iter_pcm(store, wanted)}
    length = max(len(pcm[place]) for place in places)
    padded = [np.pad(pcm[place], (0, length - len(pcm[place]))).tobytes() for place in places]
    columns = [chosen["utterance_id"], chosen["speaker_id"], chosen["split"]]
    return pa.table([*columns, pa.array(padded, pa.large_binary())], schema=ROOMS)


def _taken(rows: pa.Table) -> pa.Table:
    places = np.array([stable_fraction(name) for name in rows["utterance_id"].to_pylist()])
    parts = []
    for split in pc.unique(rows["split"]).to_pylist():
        mine = np.flatnonzero(pc.equal(rows["split"], split).to_numpy())
        parts.append(rows.take(pa.array(mine[np.argsort(places[mine])[:MOST_RESPONSES]])))
    return pa.concat_tables(parts)
