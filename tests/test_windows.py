"""Windows: every utterance once a round, reads in sequence, every speaker as often as due."""

from collections import Counter
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.distributions import BuildConfig, MixingConfig
from pipeline.errors import CscError
from pipeline.planning import plan_tasks
from pipeline.schema import CATALOGUE
from pipeline.windows import added, allot, cut, rounds, runs_of, widened

utterances = st.lists(
    st.tuples(st.integers(0, 4), st.integers(1, 60_000), st.integers(0, 6)), max_size=80
)


def rows_of(drawn: list[tuple[int, int, int]], split: str = "train") -> pa.Table:
    """Lay out (shard, samples, speaker) as a catalogue would."""
    seen: Counter[int] = Counter()
    rows = []
    for shard, num_samples, speaker in drawn:
        rows.append(
            dict.fromkeys(CATALOGUE.names)
            | {
                "shard": shard,
                "row": seen[shard],
                "num_samples": num_samples,
                "speaker_id": f"c/{speaker}",
                "utterance_id": f"u{len(rows)}",
                "kind": "speech",
                "split": split,
                "level_dbfs": -20.0,
            }
        )
        seen[shard] += 1
    return pa.Table.from_pylist(rows, schema=CATALOGUE)


@given(utterances, st.floats(0.01, 1))
@settings(max_examples=60, deadline=None)
def test_slices_have_every_utterance_once(
    drawn: list[tuple[int, int, int]], slice_mb: float
) -> None:
    table = rows_of(drawn)
    slices = cut(table, slice_mb)
    covered = [
        (shard, row)
        for part in slices
        for shard, first, stop in part.runs
        for row in range(first, stop)
    ]
    places = zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True)
    assert covered == sorted(places)
    everyone = added(slices, range(len(slices)))
    assert everyone == Counter(table["speaker_id"].to_pylist())


@given(st.integers(0, 2**60), st.integers(0, 50), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_a_round_reads_every_slice(key: int, count: int, width: int) -> None:
    per_round = max(1, -(-count // width))
    drawn = list(islice(rounds(key, count, width), 2 * per_round))
    assert drawn == list(islice(rounds(key, count, width), 2 * per_round))
    for turn in (drawn[:per_round], drawn[per_round:]):
        assert {place for window in turn for place in window} == set(range(count))
        assert all(len(window) == min(width, count) for window in turn)
        assert all(window == sorted(set(window)) for window in turn)
    if count > 20 > 2 * width:
        assert drawn[:per_round] != drawn[per_round:]


def test_runs_that_touch_are_read_in_one_go() -> None:
    slices = cut(rows_of([(0, 1000, 1)] * 6 + [(1, 1000, 2)] * 2), 0.004)
    assert len(slices) == 4
    assert runs_of(slices, [0, 1, 3]) == [(0, 0, 4), (1, 0, 2)]
    assert runs_of(slices, [2]) == [(0, 4, 6)]


def test_a_window_of_too_few_grows() -> None:
    slices = cut(rows_of([(0, 1000, speaker) for speaker in range(5)]), 0.002)
    wide = widened([3], slices, lambda chosen: len(added(slices, chosen)) >= 3)
    assert wide == [0, 3, 4]
    assert widened([0], slices, lambda _: False) == [0, 1, 2, 3, 4]


@given(st.integers(0, 10_000), st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_episodes_are_shared_out_to_the_last(episodes: int, weights: list[float]) -> None:
    counts = allot(episodes, np.array(weights))
    assert sum(counts) == episodes
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - episodes * weight / sum(weights)) < 1 + 1e-6


def crowd(seed: int, speakers: int) -> pa.Table:
    """Return speakers with 4 to 200 utterances each, one after another, over several shards."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(4, 200, speakers)
    drawn = [
        (place // 500, 32_000, speaker)
        for place, speaker in enumerate(np.repeat(np.arange(speakers), counts).tolist())
    ]
    return rows_of(drawn)


def config_of(**changes: object) -> BuildConfig:
    small = {
        "train_episodes": 4000,
        "valid_episodes": 10,
        "shard_mb": 0.5,
        "slice_mb": 1.0,
        "window_slices": 6,
        "mixing": MixingConfig(seconds=0.11, noise_share=0.0),
    }
    return BuildConfig(**small | changes)  # type: ignore[arg-type]


def both_splits(table: pa.Table) -> pa.Table:
    few = rows_of([(99, 32_000, speaker) for speaker in range(90, 96) for _ in range(3)], "valid")
    return pa.concat_tables([table, few])


@pytest.mark.parametrize("passes", [1, 3])
def test_a_plan_names_every_episode_once(passes: int) -> None:
    tasks = plan_tasks(both_splits(crowd(0, 60)), None, config_of(passes=passes), 3)
    for split, episodes in (("train", 4000 * passes), ("valid", 10)):
        shards = [s for task in tasks if task["split"] == split for s in task["shards"]]
        numbers = [i for shard in shards for i in range(shard["first"], shard["stop"])]
        assert numbers == list(range(episodes))
        assert len({shard["name"] for shard in shards}) == len(shards)
        most = config_of().episodes_per_shard
        assert all(0 < shard["stop"] - shard["first"] <= most for shard in shards)


def test_windows_are_drawn_anew_per_pass_and_small() -> None:
    tasks = plan_tasks(both_splits(crowd(1, 200)), None, config_of(passes=2), 3)
    train = [task for task in tasks if task["split"] == "train"]
    of_pass = [
        {str(task["runs"]) for task in train if f"-{turn:03d}-" in task["shards"][0]["name"]}
        for turn in range(2)
    ]
    assert not of_pass[0] & of_pass[1]
    for task in train:
        assert sum(stop - first for _, first, stop in task["runs"]) * 64_000 < 6.5e6


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_speakers_are_drawn_as_often_as_due_over_all_windows(balance: float) -> None:
    """What windows are due and what speakers have in them make up for how they are spread."""
    table = crowd(2, 80)
    mixing = MixingConfig(seconds=0.11, noise_share=0.0, balance=balance)
    config = config_of(mixing=mixing, train_episodes=20_000)  # several rounds of windows
    tasks = plan_tasks(both_splits(table), None, config, 3)
    counts = Counter(table["speaker_id"].to_pylist())
    expected: Counter[str] = Counter()
    shard, row = table["shard"].to_numpy(), table["row"].to_numpy()
    names = np.array(table["speaker_id"].to_pylist())
    for task in (task for task in tasks if task["split"] == "train"):
        inside = np.zeros(len(table), bool)
        for number, first, stop in task["runs"]:
            inside |= (shard == number) & (row >= first) & (row < stop)
        here = {n: c for n, c in Counter(names[inside].tolist()).items() if c >= 2}
        weights = {name: count * counts[name] ** (balance - 1) for name, count in here.items()}
        episodes = sum(part["stop"] - part["first"] for part in task["shards"])
        for name, weight in weights.items():
            expected[name] += episodes * weight / sum(weights.values())
    due = {name: count**balance for name, count in counts.items()}
    for name in counts:
        assert expected[name] / 20_000 == pytest.approx(due[name] / sum(due.values()), rel=0.2)


def test_a_split_that_lacks_something_is_named() -> None:
    with pytest.raises(CscError, match=r"split 'valid': .*change ingest\.splits"):
        plan_tasks(crowd(0, 30), None, config_of(), 3)
