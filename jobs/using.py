"""A registered model at work on files: embed, separate, enrol, identify."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from csc_model.longform import Voices
from csc_model.model import ACTIVE, CSC
from jobs.console import progress, say
from jobs.listening import listen
from jobs.scoring import enrol as enrol_vector
from jobs.verify import Verifier
from jobs.voice_files import slot_names, write_slots
from pipeline.audio import load
from pipeline.errors import CscError
from pipeline.schema import content_id
from pipeline.storage import Folder
from pipeline.updates import update

GALLERY = pa.schema(
    [
        ("name", pa.string()),
        ("model", pa.string()),  # that made the vector: those of another mean something else
        ("files", pa.list_(pa.string())),
        ("vector", pa.list_(pa.float32())),
    ]
)
EMBEDDING = pa.schema(
    [
        ("path", pa.string()),
        ("seconds", pa.float64()),
        ("view", pa.string()),  # slot-1, slot-2, .., whole
        ("activity", pa.float32()),  # probability of a speaker
        ("vector", pa.list_(pa.float32())),
        ("error", pa.string()),  # why a file has none
    ]
)


def embed_files(model: CSC, paths: Sequence[str]) -> pa.Table:
    """Return a row for each view of each file; a file that cannot be used is a row with why."""
    rows = []
    for path in paths:
        try:
            heard = listen(model, path)
        except CscError as error:
            rows.append(dict.fromkeys(EMBEDDING.names) | {"path": path, "error": str(error)})
            continue
        views = zip(heard.names, heard.activity, heard.vectors, strict=True)
        rows += [
            {
                "path": path,
                "seconds": heard.seconds,
                "view": name,
                "activity": float(activity),
                "vector": vector,
                "error": "",
            }
            for name, activity, vector in views
        ]
    return pa.Table.from_pylist(rows, EMBEDDING)


def check_output(to: Path) -> None:
    """Assert that a name says how to write embeddings.

    Raises:
        CscError: it does not.
    """
    if to.suffix not in {".parquet", ".npz"}:
        raise CscError(f"{to}: give a name that ends in .parquet or .npz")


def write_embeddings(table: pa.Table, to: Path) -> None:
    """Write Parquet, or numpy's `.npz` with an array of each column, as the name says.

    Raises:
        CscError: the place cannot be written to.
    """
    if to.suffix == ".parquet":
        sink = io.BytesIO()
        pq.write_table(table, sink)
        data = sink.getvalue()
    else:
        made = table.filter(pc.is_valid(table["vector"])).drop_columns("error")
        columns = {name: np.array(made[name].to_pylist()) for name in made.column_names}
        sink = io.BytesIO()
        np.savez(sink, allow_pickle=False, **columns)
        data = sink.getvalue()
    Folder.at(to.parent).put(to.name, data)


def separate_file(model: CSC, path: str, to: Path) -> list[tuple[Path, float]]:
    """Write each voice of a mixture as a WAV file; return its path and how active its slot is.

    Raises:
        CscError: the file cannot be used, or the folder cannot be written to.
    """
    samples, voices = torch.from_numpy(load(path)), Voices()
    names = slot_names(path, model.config.num_slots)
    with progress("windows") as advance:
        pieces = model.separated(samples, voices, on_progress=advance)
        return write_slots(to, names, pieces, voices)


class Gallery:
    """People by their vectors, in one Parquet file."""

    def __init__(self, path: Path) -> None:
        self.folder, self.name = Folder.at(path.parent), path.name
        self.path = self.folder.path(self.name)

    def read(self) -> pa.Table:
        """Return who is enrolled.

        Raises:
            CscError: the file is no gallery.
        """
        there = self.folder.exists(self.name)
        return self._people(self.folder.read(self.name) if there else None)

    def _people(self, data: bytes | None) -> pa.Table:
        if data is None:
            return GALLERY.empty_table()
        try:
            people = pq.read_table(io.BytesIO(data)).select(GALLERY.names).cast(GALLERY)
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise CscError(f"{self.path} is no gallery ({error}): give another --gallery") from None
        if any(column.null_count for column in people.columns):
            raise CscError(f"{self.path} is no gallery (a field is empty): give another --gallery")
        return people

    def enrol(self, verifier: Verifier, name: str, paths: Sequence[str]) -> bool:
        """Enrol somebody by clean recordings, in place of what was there; tell if there was."""
        clean = [listen(verifier.model, path).vectors for path in paths]
        vector = enrol_vector(np.stack(clean))
        files = [content_id(Path(path).read_bytes()) for path in paths]
        row = {"name": name, "model": verifier.model_id, "files": files, "vector": vector}
        return self.put(row)

    def put(self, row: Mapping[str, Any]) -> bool:
        """Put somebody's row in place of the one that was there; tell if there was.

        Nobody is lost whom others enrol at the same time; where the store says that it cannot see
        to that, it is passed on.
        """
        own, was_there = pa.Table.from_pylist([row], GALLERY), None

        def changed(data: bytes | None) -> bytes:
            nonlocal was_there
            table = self._people(data)
            same = pc.equal(table["name"], row["name"])
            there = table.filter(same)
            if was_there is None or not there.equals(own):  # else an answer was lost
                was_there = len(there) > 0
            sink = io.BytesIO()
            pq.write_table(pa.concat_tables([table.filter(pc.invert(same)), own]), sink)
            return sink.getvalue()

        if not update(self.folder, self.name, changed):
            say(
                f"{self.folder.uri} does not write on a condition: whom others enrolled in "
                f"{self.name} in this moment may be lost; let one enrol at a time"
            )
        return bool(was_there)

    def identify(self, verifier: Verifier, path: str, prior: float) -> list["Match"]:
        """Return everybody with how probably they are heard in a file, the likeliest first.

        Raises:
            CscError: nobody is enrolled, or somebody with another model.
        """
        table = self.read()
        if not len(table):
            raise CscError(f"nobody is enrolled in {self.path}: csc enrol NAME FILES")
        others = [row["name"] for row in table.to_pylist() if row["model"] != verifier.model_id]
        if others:
            raise CscError(
                f"{', '.join(others)} in {self.path} were enrolled with another model, whose "
                "vectors cannot be compared: enrol them again, or give that --model"
            )
        heard = listen(verifier.model, path)
        used = heard.activity >= ACTIVE
        names = [name for name, is_used in zip(heard.names, used, strict=True) if is_used]
        cosines = np.stack(table["vector"].to_pylist()) @ heard.vectors[used].T
        score = cosines.max(1).astype(np.float64)
        probability = verifier.calibration.probability(score, prior)
        found = zip(
            table["name"].to_pylist(),
            probability.tolist(),
            score.tolist(),
            [names[best] for best in cosines.argmax(1)],
            strict=True,
        )
        return sorted((Match(*one) for one in found), key=lambda one: -one.score)


class Match(NamedTuple):
    """Somebody of a gallery, and how they are heard."""

    name: str
    probability: float
    score: float
    view: str
