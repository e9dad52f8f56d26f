"""The build as a plain loop in one process: what `tests.benchmarks.build` compares with.

Which window is read for what, the recipes and the format of a shard are the product's own; reading,
placing, measuring, forcing to disk and hashing are not. Sources have a line each: there is no
babble, and no mixture of mixtures.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from pipeline.build import speakers_of, window_table, write_episodes
from pipeline.distributions import BuildConfig, MixingConfig
from pipeline.lines import MOST_GAIN_DB
from pipeline.mixing import Recipe, recipe
from pipeline.planning import plan_tasks
from pipeline.schema import EPISODE, NOISE
from pipeline.shards import (
    INDEX,
    audio_of,
    open_shard,
    read_catalogue,
    store_shard_name,
)
from pipeline.storage import Folder
from tests.benchmarks.peers import LENGTH


def plain_build(folder: Path, store: Folder, config: BuildConfig, seed: int) -> dict[str, str]:
    """Write the shards that `build` writes, one after another; return their sha256."""
    folder.mkdir(parents=True)
    catalogue = read_catalogue(store)
    speakers = speakers_of(catalogue)
    row_of = {name: row for row, name in enumerate(speakers["speaker_id"].to_pylist())}
    written = {}
    for task in plan_tasks(catalogue, None, config, seed):
        mixing = MixingConfig.model_validate(task["mixing"])
        table = window_table(store, task, mixing, speakers)
        audio = _window(store, {shard for shard, *_ in task["runs"]})
        for shard in task["shards"]:
            numbers = range(shard["first"], shard["stop"])
            recipes = [recipe(task["key"], number, table, mixing) for number in numbers]
            rows = _table(recipes, audio, row_of, mixing)
            written[shard["name"]] = _write(folder, shard["name"], rows, config)
    (folder / INDEX).write_text(json.dumps(written))
    return written


def _window(store: Folder, shards: set[int]) -> dict[int, pa.ChunkedArray]:
    """Read the audio of the utterance shards that a window is of."""
    folder = audio_of(store)
    return {n: open_shard(folder, store_shard_name(n)).read(["pcm"])["pcm"] for n in shards}


def _table(
    recipes: Sequence[Recipe],
    audio: dict[int, pa.ChunkedArray],
    row_of: dict[str, int],
    mixing: MixingConfig,
) -> pa.Table:
    """Place the sources of each episode on lines, and measure what came to be."""
    rows = []
    for drawn in recipes:
        pcm = np.zeros((len(drawn.sources), LENGTH), "<i2")
        lines: list[dict[str, Any]] = []
        for line, one in zip(pcm, drawn.sources, strict=True):
            spoken = np.frombuffer(audio[one.shard][one.row].as_buffer(), "<i2")
            place = line[one.onset : one.onset + one.num_samples]
            place[:] = spoken[one.offset : one.offset + one.num_samples]
            noise = one.slot == mixing.num_slots - 1
            level_dbfs = _level(place)
            heard_dbfs = max(level_dbfs, one.utterance_dbfs - 20.0)
            gain_db = min((one.level_dbfs or 0.0) - heard_dbfs, MOST_GAIN_DB)
            lines.append(
                {
                    "condition": one.condition,
                    "slot": one.slot,
                    "room": one.room,
                    "speaker": NOISE if noise else row_of[one.speaker_id],
                    "fixed": drawn.conditions[one.condition].fixed,
                    "gain_db": gain_db,
                    "level_dbfs": heard_dbfs,
                    "got_dbfs": level_dbfs + gain_db,
                }
            )
        rows.append(
            {
                "episode": drawn.episode,
                "anchor": row_of[drawn.anchor],
                "mixit": False,
                "conditions": [
                    asked._asdict() | _measures(drawn, number, lines, mixing)
                    for number, asked in enumerate(drawn.conditions)
                ],
                "sources": [
                    source._asdict() | {"gain_db": line["gain_db"]}
                    for source, line in zip(drawn.sources, lines, strict=True)
                ],
                "lines": lines,
                "checksum": xxhash.xxh3_64_intdigest(pcm),
                "pcm": pcm.tobytes(),
            }
        )
    return pa.Table.from_pylist(rows, schema=EPISODE)


def _level(pcm: np.ndarray[Any, Any]) -> float:
    """Return the level of the 20 ms frames over -70 dBFS and at most 20 dB under their mean."""
    frames = pcm[: len(pcm) // 320 * 320].reshape(-1, 320).astype(np.float64)
    power = (frames**2).sum(1) / (320 * 32768.0**2)
    audible = power[power > 1e-7]
    if not len(audible):
        return -120.0
    active = audible[audible > audible.mean() * 0.01]
    return round(float(10 * np.log10(active.mean())), 2)


def _measures(
    drawn: Recipe, number: int, lines: list[dict[str, Any]], mixing: MixingConfig
) -> dict[str, float | None]:
    """Return SIR, SNR and overlap of a mixture as it came to be."""
    mine = [line for line in lines if line["condition"] == number]
    level = {line["slot"]: line["got_dbfs"] for line in mine}
    target, noise = level.get(0), level.get(mixing.num_slots - 1)
    rivals = [level[slot] for slot in range(1, mixing.num_slots - 1) if slot in level]
    others = float(10 * np.log10(sum(10 ** (each / 10) for each in rivals))) if rivals else None
    speech = others if target is None else target
    both = target is not None and others is not None
    heard = np.zeros((2, LENGTH), bool)
    for source in drawn.sources:
        if source.condition == number and source.slot < mixing.num_slots - 1:
            stop = source.onset + source.num_samples
            heard[min(source.slot, 1), source.onset : stop] = True
    return {
        "realised_sir_db": target - others if both else None,
        "realised_snr_db": None if noise is None or speech is None else speech - noise,
        "realised_overlap": float(heard.all(0).mean()) if both else None,
    }


def _write(folder: Path, name: str, rows: pa.Table, config: BuildConfig) -> str:
    """Write a shard, force it to disk, hash it, and write a record beside it."""
    path = folder / name
    write_episodes(path, rows, config.episodes_per_group)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    record = {"name": name, "rows": len(rows), "sha256": sha256}
    (folder / f"{name}.done.json").write_text(json.dumps(record))
    return sha256
