"""What an ingest came to, in numbers: the part of the index that people read."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.corpora import CorpusConfig
from pipeline.schema import SAMPLE_RATE_HZ

EDGES: Mapping[str, NDArray[np.float64]] = {
    "level_dbfs": np.arange(-60.0, 1, 5),
    "snr_db": np.arange(-10.0, 71, 5),
    "bandwidth_hz": np.arange(0.0, 8001, 500),
    "duration_s": np.arange(0.0, 16, 1),
}


def summary(
    plan: pa.Table, catalogue: pa.Table, rejects: pa.Table, corpora: Sequence[CorpusConfig]
) -> dict[str, Any]:
    """Return counts and seconds: in, kept, rejected by reason; speakers; histograms by seconds.

    Room impulse responses are counted, by themselves; nobody listens to their seconds.
    """
    rooms = pa.array([corpus.name for corpus in corpora if corpus.kind == "room"], pa.string())
    kept, refused = (_outside(rooms, table) for table in (catalogue, rejects))
    speech = kept.filter(pc.equal(kept["kind"], "speech"))
    return {
        "files": pc.count_distinct(_recordings(plan)).as_py(),
        "kept": len(kept),
        "responses": len(catalogue) - len(kept),
        "seconds": _seconds(kept),
        "seconds_in": round(_seconds(kept) + _seconds(refused), 3),
        "rejected": _by(rejects, "reason", "count"),
        "rejected_seconds": _by(refused, "reason", "sum"),
        "speakers": _speakers_by(speech, "split"),
        "labels": _speakers_by(speech, "label_kind"),
        "corpora": {
            corpus.name: _of_corpus(corpus, plan, catalogue, rejects) for corpus in corpora
        },
        "histograms": {name: _histogram(speech, name, EDGES[name]) for name in EDGES},
        "examples": _examples(rejects),
    }


def _outside(corpora: pa.Array, table: pa.Table) -> pa.Table:
    return table.filter(pc.invert(pc.is_in(table["corpus"], value_set=corpora)))


def _recordings(table: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(table["corpus"], table["path"], "/")


def _seconds(table: pa.Table) -> float:
    return round((pc.sum(table["num_samples"]).as_py() or 0) / SAMPLE_RATE_HZ, 3)


def _by(rejects: pa.Table, key: str, what: str) -> dict[str, Any]:
    grouped = rejects.group_by(key).aggregate([("num_samples", what)]).sort_by(key)
    values = grouped[f"num_samples_{what}"].to_pylist()
    if what == "sum":
        values = [round(value / SAMPLE_RATE_HZ, 3) for value in values]
    return dict(zip(grouped[key].to_pylist(), values, strict=True))


def _speakers_by(speech: pa.Table, key: str) -> dict[str, int]:
    counts = speech.group_by(key).aggregate([("speaker_id", "count_distinct")]).sort_by(key)
    found = counts["speaker_id_count_distinct"].to_pylist()
    return dict(zip(counts[key].to_pylist(), found, strict=True))


def _of_corpus(
    corpus: CorpusConfig, plan: pa.Table, catalogue: pa.Table, rejects: pa.Table
) -> dict[str, Any]:
    plan, kept, refused = (
        table.filter(pc.equal(table["corpus"], corpus.name)) for table in (plan, catalogue, rejects)
    )
    rooms = corpus.kind == "room"
    return {
        "files": pc.count_distinct(_recordings(plan)).as_py(),
        "seconds_in": 0.0 if rooms else round(_seconds(kept) + _seconds(refused), 3),
        "seconds": 0.0 if rooms else _seconds(kept),
        "responses": len(kept) if rooms else 0,
        "licence": corpus.licence,
        "language": corpus.language,
    }


def _histogram(speech: pa.Table, name: str, edges: NDArray[np.float64]) -> dict[str, Any]:
    """Return seconds of speech by a measure; what lies outside counts with the last bin there."""
    seconds = speech["num_samples"].to_numpy() / SAMPLE_RATE_HZ
    values = seconds if name == "duration_s" else speech[name].to_numpy()
    inside = np.clip(values, edges[0], np.nextafter(edges[-1], edges[0]))
    weights, _ = np.histogram(inside, edges, weights=seconds)
    return {"edges": edges.tolist(), "seconds": [round(float(weight), 3) for weight in weights]}


def _examples(rejects: pa.Table) -> dict[str, Any]:
    """Return the first reject of each reason."""
    examples = {}
    for reason in sorted(pc.unique(rejects["reason"]).to_pylist()):
        first = pc.index(rejects["reason"], reason).as_py()
        row = rejects.slice(first, 1).to_pylist()[0]
        examples[reason] = {
            "corpus": row["corpus"],
            "path": row["path"],
            "start_s": round(row["start_sample"] / SAMPLE_RATE_HZ, 2),
            "detail": row["detail"],
        }
    return examples
