"""Exports: what is written can be read by others, adds up, and is not written twice."""

import csv
import json
from pathlib import Path
from typing import Any

import lhotse
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.build import build, dataset_id
from pipeline.datasets import read_dataset
from pipeline.distributions import BuildConfig, MixingConfig
from pipeline.errors import CscError
from pipeline.exchange.export import MARKER, WAV_HEADER_BYTES, Exported, export
from pipeline.exchange.formats import Wanted
from pipeline.exchange.unpack import mixtures_of
from pipeline.loader import EpisodeLoader
from pipeline.render import PEAK, render
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.storage import Folder
from tests.conftest import BUILD, serially
from tests.librimix_files import as_written, librimix, write_files


def exported(
    dataset: Folder, out: Path | Folder, form: str = "librimix", **options: Any
) -> Exported:
    of = {name: options.pop(name) for name in ("split", "speakers") if name in options}
    wanted = Wanted(read_dataset(dataset), of.pop("split", "train"), **of)
    folder = out if isinstance(out, Folder) else Folder.at(out)
    return export(wanted, folder, form, lambda *_: None, **options)


def samples(path: str | Path) -> NDArray[np.int64]:
    """Read a WAV file, which has to be 16 kHz int16."""
    with soundfile.SoundFile(path) as file:
        assert (file.samplerate, file.channels, file.subtype) == (SAMPLE_RATE_HZ, 1, "PCM_16")
        return np.asarray(file.read(dtype="int16"), np.int64)


def rows_of(out: Path, split: str = "train", mode: str = "min") -> list[dict[str, str]]:
    """Return the rows of both lists of a split."""
    rows = []
    for path in sorted(out.glob(f"wav16k/{mode}/metadata/mixture_{split}_mix_*.csv")):
        with path.open(newline="") as file:
            rows += list(csv.DictReader(file))
    return rows


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def dataset_of(store: Folder, root: Path, **mixing: Any) -> Folder:
    """Build a few mixtures of another kind."""
    config = BuildConfig(
        train_episodes=8,
        valid_episodes=2,
        shard_mb=0.6,
        episodes_per_group=2,
        mixing=MixingConfig(seconds=0.5, **mixing),
    )
    folder = Folder.at(root).child(dataset_id(store.read_json("index.json"), config, 1))
    build(folder, store, config, 1, serially)
    return folder


def test_librimix_layout_adds_up(dataset: Folder, tmp_path: Path) -> None:
    made = exported(dataset, tmp_path)
    rows = rows_of(tmp_path)
    mixtures = list(mixtures_of(read_dataset(dataset), "train"))
    assert len(mixtures) == BUILD.train_episodes * BUILD.mixing.conditions
    assert made.mixtures == len(rows) == sum(len(mixture.slots) == 2 for mixture in mixtures)
    assert made.left_out == {"without an interferer": len(mixtures) - len(rows)}
    assert made.left_out.total() > 0
    noisy = 0
    for row in rows:
        mixture = samples(row["mixture_path"])
        parts = [samples(path) for name, path in row.items() if name.endswith("_path")][1:]
        assert {len(part) for part in parts} == {len(mixture)} == {int(row["length"])}
        assert np.abs(mixture - sum(parts)).max() <= 2
        kind = "mix_both" if "noise_path" in row else "mix_clean"
        noisy += kind == "mix_both"
        folder = tmp_path / "wav16k/min/train"
        name = f"{row['mixture_ID']}.wav"
        assert row["mixture_path"] == str(folder / kind / name)
        assert row["source_1_path"] == str(folder / "s1" / name)
        assert row["source_2_path"] == str(folder / "s2" / name)
    assert 0 < noisy < len(rows)
    folders = {path.name for path in (tmp_path / "wav16k/min/train").iterdir()}
    assert folders == {"mix_both", "mix_clean", "s1", "s2", "noise"}


def test_lists_have_the_columns_of_librimix(dataset: Folder, tmp_path: Path) -> None:
    made = exported(dataset, tmp_path, limit=30)
    heads = {name: (tmp_path / name).read_text().splitlines()[0] for name in made.lists}
    root = "wav16k/min/metadata/mixture_train_mix"
    sources = "mixture_ID,mixture_path,source_1_path,source_2_path"
    assert heads == {
        f"{root}_both.csv": f"{sources},noise_path,length",
        f"{root}_clean.csv": f"{sources},length",
    }


def test_what_is_exported_is_what_is_trained_on(dataset: Folder, tmp_path: Path) -> None:
    exported(dataset, tmp_path, "lhotse")
    loader = EpisodeLoader(dataset, "train", batch_size=BUILD.train_episodes, seed=1)
    (batch,) = loader.batches(0)
    rendered = render(batch.sources, batch.gains_db, batch.rooms, loader.rooms)
    for place, number in enumerate(batch.numbers.tolist()):
        for condition in range(BUILD.mixing.conditions):
            name = f"train-{number:08d}-{condition}.wav"
            wanted = rendered.mixtures[place, condition].numpy() * 32768
            assert np.abs(samples(tmp_path / "wav/mixture" / name) - wanted).max() < 0.51
            for slot in (0, 1):
                path = tmp_path / f"wav/s{slot + 1}" / name
                wanted = rendered.references[place, condition, slot].numpy() * 32768
                assert path.exists() == bool(batch.speakers[place, condition, slot] >= 0)
                if path.exists():
                    assert np.abs(samples(path) - wanted).max() < 0.51


def test_lhotse_loads_and_validates(dataset: Folder, tmp_path: Path) -> None:
    made = exported(dataset, tmp_path, "lhotse")
    assert not made.left_out
    assert sorted(made.lists) == ["cuts.jsonl.gz", "recordings.jsonl.gz", "supervisions.jsonl.gz"]
    recordings, supervisions, cuts = (
        lhotse.load_manifest(tmp_path / f"{name}.jsonl.gz")
        for name in ("recordings", "supervisions", "cuts")
    )
    lhotse.validate_recordings_and_supervisions(recordings, supervisions)
    lhotse.validate(cuts, read_data=True)
    assert len(list(cuts)) == made.mixtures == BUILD.train_episodes * BUILD.mixing.conditions
    for cut, mixture in zip(cuts, mixtures_of(read_dataset(dataset), "train"), strict=True):
        assert (cut.id, cut.duration) == (mixture.name, BUILD.mixing.seconds)
        spoken = [source for source in mixture.sources if source["slot"] < 2]
        for said, source in zip(cut.supervisions, spoken, strict=True):
            assert said.speaker == source["speaker_id"]
            assert said.custom["slot"] == source["slot"]
            assert round(said.start * SAMPLE_RATE_HZ) == source["onset"]
            assert round(said.duration * SAMPLE_RATE_HZ) == source["num_samples"]
            assert said.custom["reference"] == cut.custom["references"][f"s{source['slot'] + 1}"]
        parts = [samples(path) for path in cut.custom["references"].values()]
        whole = np.rint(cut.load_audio()[0] * 32768).astype(np.int64)
        assert np.abs(whole - sum(parts)).max() <= 2
        for name in ("sir_db", "snr_db", "overlap"):
            value = mixture.condition[f"realised_{name}"]
            assert cut.custom.get(name) == (
                None if value is None else pytest.approx(value, abs=1e-3)
            )


@pytest.mark.parametrize("form", ["librimix", "lhotse"])
def test_an_export_goes_on_and_is_the_same_anywhere(
    dataset: Folder, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = exported(dataset, out, form, limit=16)
    whole = exported(dataset, out, form)
    assert whole.mixtures > first.mixtures
    assert exported(dataset, out, form).written == 0
    before = contents(out)
    wavs = [name for name in before if name.endswith(".wav")]
    assert first.written + whole.written == len(wavs)
    assert (out / wavs[0]).stat().st_size == WAV_HEADER_BYTES + 2 * BUILD.mixing.num_samples
    (out / wavs[0]).write_bytes(before[wavs[0]][:100])
    (out / wavs[1]).unlink()
    (out / ".part-left").mkdir()
    assert exported(dataset, out, form).written == 2
    assert contents(out) == before
    assert exported(dataset, out, form, overwrite=True).written == len(wavs)
    assert contents(out) == before
    out.rename(tmp_path / "other")
    exported(dataset, out, form)
    assert contents(out) == before


def test_another_folder_is_left_alone(dataset: Folder, tmp_path: Path) -> None:
    exported(dataset, tmp_path / "a", limit=2)
    with pytest.raises(CscError, match=r"is not empty and holds no export like this one .*lhotse"):
        exported(dataset, tmp_path / "a", "lhotse")
    with pytest.raises(CscError, match="choose another --out"):
        exported(dataset, tmp_path / "a", speakers=3)
    made = exported(dataset, tmp_path / "a", split="valid", limit=2)  # beside the other split
    assert made.mixtures + made.left_out.total() == 2
    exported(dataset, tmp_path / "b", "lhotse", limit=2)
    with pytest.raises(CscError, match="choose another --out"):
        exported(dataset, tmp_path / "b", "lhotse", split="valid")
    (tmp_path / "c").mkdir()
    (tmp_path / "c/mine.txt").write_text("mine")
    with pytest.raises(CscError, match="choose another --out"):
        exported(dataset, tmp_path / "c")
    assert contents(tmp_path / "c") == {"mine.txt": b"mine"}
    with pytest.raises(CscError, match="no mixtures of split 'test': choose among train, valid"):
        exported(dataset, tmp_path / "d", split="test")
    with pytest.raises(CscError, match="choose another --out"):
        exported(dataset, dataset)


def test_what_the_format_cannot_tell_is_counted(store: Folder, tmp_path: Path) -> None:
    absent = dataset_of(store, tmp_path, absent_share=0.5, interferer_shares=[0.0, 0.5, 0.5])
    made = exported(absent, tmp_path / "a")
    assert made.left_out["without the target"] > 0
    assert set(made.left_out) <= {"without the target", "of 2 speakers, not 3"}
    assert made.mixtures + made.left_out.total() == 16
    two = exported(absent, tmp_path / "b", speakers=2)
    assert made.mixtures + two.mixtures + made.left_out["without the target"] == 16
    assert not exported(absent, tmp_path / "l", "lhotse").left_out
    mixit = dataset_of(store, tmp_path, mixit_share=1.0, conditions=1)
    assert exported(mixit, tmp_path / "c").left_out == {"mixtures of mixtures": 8}
    assert exported(mixit, tmp_path / "d", "lhotse").mixtures == 8
    cuts = lhotse.load_manifest(tmp_path / "d/cuts.jsonl.gz")
    assert all(len(cut.supervisions) == 4 and cut.custom["mixit"] for cut in cuts)


def test_loud_mixtures_are_scaled_with_their_parts(store: Folder, tmp_path: Path) -> None:
    loud = dataset_of(store, tmp_path, sir_min_db=-40.0, sir_max_db=-35.0)
    exported(loud, tmp_path / "a")
    peaks = []
    for row in rows_of(tmp_path / "a"):
        mixture = samples(row["mixture_path"])
        parts = [samples(path) for name, path in row.items() if name.endswith("_path")][1:]
        assert np.abs(mixture - sum(parts)).max() <= 2
        peaks.append(int(np.abs(mixture).max()))
    assert max(peaks) == pytest.approx(PEAK * 32768, abs=1)


def test_damage_is_named(store: Folder, tmp_path: Path) -> None:
    folder = dataset_of(store, tmp_path)
    name = folder.read_json("index.json")["shards"][0]["name"]
    path = Path(folder.path(name))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 255
    path.write_bytes(data)
    split = name.partition("-")[0]
    with pytest.raises(CscError, match=f"{name} is damaged"):
        exported(folder, tmp_path / "a", split=split)
    path.unlink()
    with pytest.raises(CscError, match=name):
        exported(folder, tmp_path / "b", split=split)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_from_librimix_to_librimix(mode: str, tmp_path: Path) -> None:
    files = write_files(tmp_path, 2)
    folder = files.imported(tmp_path / "made", mode=mode)
    exported(folder, tmp_path / "out")
    rows = rows_of(tmp_path / "out", mode=mode)
    assert len(rows) == len(files.rows)
    for row, told in zip(files.rows, rows, strict=True):
        parts = librimix(files, row, mode, True)
        assert np.abs(sum(parts)).max() < PEAK
        for name, wanted in (
            ("mixture", sum(parts, np.zeros(1))),
            *zip(("source_1", "source_2", "noise"), parts, strict=True),
        ):
            theirs = as_written(wanted, tmp_path / "theirs.wav")
            assert np.abs(samples(told[f"{name}_path"]) - theirs).max() <= 1


def test_exports_to_an_object_store(dataset: Folder, s3: str) -> None:
    out = Folder.at(f"{s3}/exported")
    made = exported(dataset, out, limit=4)
    assert made.written == sum(file.name.endswith(".wav") for file in out.list())
    assert exported(dataset, out, limit=4).written == 0
    assert out.exists(MARKER)


def test_the_commands(tmp_path: Path) -> None:
    files = write_files(tmp_path, 2)
    workspace = ["--workspace", str(tmp_path / "work")]
    arguments = ["--metadata", str(files.metadata), "--root", files.speech.uri, *workspace]
    runner = CliRunner()
    made = runner.invoke(app, ["import", "librimix", *arguments, "--seconds", "1"])
    assert made.exit_code == 0, made.output
    assert "3 train mixtures of 4 speakers; 1 shards" in made.output
    again = runner.invoke(app, ["import", "librimix", *arguments, "--seconds", "1"])
    assert "finished before" in again.output
    (folder,) = (tmp_path / "work/mixtures").iterdir()
    out = tmp_path / "out"
    arguments = ["export", folder.name[:6], "--format", "librimix", "--out", str(out), *workspace]
    told = runner.invoke(app, arguments)
    assert told.exit_code == 0, told.output
    assert "3 mixtures; 9 WAV files written" in told.output
    assert len(rows_of(out)) == 3
    assert json.loads((out / MARKER).read_text())["dataset"] == folder.name
    missing = runner.invoke(app, [*arguments[:1], "nothing", *arguments[2:]])
    assert isinstance(missing.exception, CscError)
