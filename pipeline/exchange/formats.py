"""How other tools want mixtures listed: where WAV files lie, and what is said of them."""

import csv
import gzip
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from pipeline.datasets import Dataset
from pipeline.exchange.unpack import MIXTURE, Mixture, part_of
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.storage import Folder

FORMAT_VERSION = 1
CONDITION_DECIMALS = 3


class Wanted(NamedTuple):
    """What is exported."""

    dataset: Dataset
    split: str
    speakers: int | None = None  # that a mixture has to have, None: the most that there are

    @property
    def voices(self) -> int:
        """How many speakers a mixture has, for formats that know but one number."""
        shares = self.dataset.config.mixing.interferer_shares
        return self.speakers or 1 + max(n for n, share in enumerate(shares) if share > 0)


class Format(ABC):
    """The lists of one format, in local files while they grow; `put` is what makes them count."""

    def __init__(self, wanted: Wanted, out: Folder, scratch: Path) -> None:
        self.wanted, self.out, self.scratch = wanted, out, scratch
        self._stack, self._open = ExitStack(), dict[str, tuple[Path, TextIO]]()

    @staticmethod
    @abstractmethod
    def mark(wanted: Wanted) -> dict[str, Any]:
        """Return what exports have to agree in to share a folder."""

    @abstractmethod
    def refusal(self, mixture: Mixture) -> str | None:
        """Say why this format cannot tell of a mixture, or None."""

    @abstractmethod
    def names(self, mixture: Mixture) -> dict[str, str]:
        """Return the WAV files of a mixture by what is in them."""

    @abstractmethod
    def add(self, mixture: Mixture) -> None:
        """Tell of a mixture."""

    def put(self) -> list[str]:
        """Put the lists into the folder and return their names."""
        self._stack.close()
        for name, (path, _) in self._open.items():
            self.out.put(name, path)
        return list(self._open)

    def _list(self, name: str, begin: str = "") -> TextIO:
        """Return a list, begun with a line when it is first asked for."""
        if name not in self._open:
            path = self.scratch / f"list-{len(self._open)}"
            file = self._stack.enter_context(self._opened(path, name))
            file.write(begin)
            self._open[name] = path, file
        return self._open[name][1]

    def _opened(self, path: Path, name: str) -> TextIO:
        if not name.endswith(".gz"):
            return path.open("w", encoding="utf-8", newline="")
        raw = self._stack.enter_context(path.open("wb"))
        # Neither time nor name: the same lists are the same bytes.
        packed = self._stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
        return io.TextIOWrapper(packed, encoding="utf-8", newline="")


class LibriMixFormat(Format):
    """The folders and CSV files that LibriMix's own scripts write, at 16 kHz.

    Mixtures with noise are `mix_both`, those without `mix_clean`. Paths are absolute, as there.
    """

    @staticmethod
    def mark(wanted: Wanted) -> dict[str, Any]:
        """Return what exports have to agree in to share a folder: splits may differ."""
        return _mark("librimix", wanted) | {"speakers": wanted.voices}

    @property
    def _root(self) -> str:
        imported = self.wanted.dataset.about["config"].get("librimix") or {}
        return f"wav16k/{imported.get('mode', 'min')}"

    def refusal(self, mixture: Mixture) -> str | None:
        if mixture.mixit:
            return "mixtures of mixtures"
        if 0 not in mixture.slots:
            return "without the target"
        if len(mixture.slots) == 1:
            return "without an interferer"
        if len(mixture.slots) != self.wanted.voices:
            return f"of {len(mixture.slots)} speakers, not {self.wanted.voices}"
        return None

    def names(self, mixture: Mixture) -> dict[str, str]:
        folders = {MIXTURE: self._kind(mixture)} | {part: part for part in mixture.parts}
        return {
            part: f"{self._root}/{self.wanted.split}/{folder}/{mixture.name}.wav"
            for part, folder in folders.items()
        }

    def add(self, mixture: Mixture) -> None:
        names, told = self.names(mixture), [MIXTURE, *mixture.parts]
        columns = [f"source_{place}_path" for place in range(1, self.wanted.voices + 1)]
        columns += ["noise_path"] if mixture.noisy else []
        file = self._list(
            f"{self._root}/metadata/mixture_{self.wanted.split}_{self._kind(mixture)}.csv",
            _row(["mixture_ID", "mixture_path", *columns, "length"]),
        )
        paths = [self.out.path(names[part]) for part in told]
        file.write(_row([mixture.name, *paths, mixture.num_samples]))

    @staticmethod
    def _kind(mixture: Mixture) -> str:
        return "mix_both" if mixture.noisy else "mix_clean"


class LhotseFormat(Format):
    """Recordings, supervisions and cuts, as `lhotse.load_manifest` reads them."""

    @staticmethod
    def mark(wanted: Wanted) -> dict[str, Any]:
        """Return what exports have to agree in to share a folder."""
        return _mark("lhotse", wanted) | {"split": wanted.split}

    def refusal(self, mixture: Mixture) -> str | None:  # noqa: ARG002 - it can tell of all
        return None

    def names(self, mixture: Mixture) -> dict[str, str]:
        return {part: f"wav/{part}/{mixture.name}.wav" for part in [MIXTURE, *mixture.parts]}

    def add(self, mixture: Mixture) -> None:
        paths = {part: self.out.path(name) for part, name in self.names(mixture).items()}
        recording = {
            "id": mixture.name,
            "sources": [{"type": "file", "channels": [0], "source": paths.pop(MIXTURE)}],
            "sampling_rate": SAMPLE_RATE_HZ,
            "num_samples": mixture.num_samples,
            "duration": mixture.seconds,
            "channel_ids": [0],
        }
        supervisions = self._supervisions(mixture, paths)
        cut = {
            "id": mixture.name,
            "start": 0,
            "duration": mixture.seconds,
            "channel": 0,
            "supervisions": supervisions,
            "recording": recording,
            "custom": _said(mixture.condition) | {"mixit": mixture.mixit, "references": paths},
            "type": "MonoCut",
        }
        for name, items in (
            ("recordings", [recording]),
            ("supervisions", supervisions),
            ("cuts", [cut]),
        ):
            file = self._list(f"{name}.jsonl.gz")
            file.writelines(json.dumps(item) + "\n" for item in items)

    def _supervisions(self, mixture: Mixture, paths: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return who speaks where: one for each utterance; those of babble are noise."""
        spoken = [source for source in mixture.sources if source["slot"] != mixture.noise_slot]
        return [
            {
                "id": f"{mixture.name}-{place}",
                "recording_id": mixture.name,
                "start": source["onset"] / SAMPLE_RATE_HZ,
                "duration": source["num_samples"] / SAMPLE_RATE_HZ,
                "channel": 0,
                "speaker": source["speaker_id"],
                "custom": {"slot": source["slot"], "reference": paths[part_of(source["slot"])]},
            }
            for place, source in enumerate(spoken)
        ]


FORMATS: dict[str, type[Format]] = {
    "librimix": LibriMixFormat,
    "lhotse": LhotseFormat,
}


def _mark(form: str, wanted: Wanted) -> dict[str, Any]:
    return {"version": FORMAT_VERSION, "format": form, "dataset": wanted.dataset.id}


def _row(cells: Sequence[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def _said(condition: Mapping[str, float | None]) -> dict[str, float]:
    """Return what a mixture is like: as measured, and as asked for where that was asked."""
    named = {
        name.removeprefix("realised_") if name.startswith("realised_") else f"asked_{name}": value
        for name, value in condition.items()
    }
    return {
        name: round(value, CONDITION_DECIMALS)
        for name, value in sorted(named.items())
        if value is not None
    }
