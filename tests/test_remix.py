"""Remixing: new mixtures of the same voices, and nobody where they must not be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.casting import Rooms
from pipeline.distributions import MixingConfig
from pipeline.errors import CscError
from pipeline.mixing import TARGET_LEVEL_DBFS
from pipeline.order import Share
from pipeline.remix import Cast, Remix

BLOCK = 4
WHOLE = Share.of(2 * BLOCK)
ROOMS = Rooms([range(2), range(2, 5)])
MIXING = MixingConfig(
    interferer_shares=[0.1, 0.4, 0.5],
    sir_min_db=-3.0,
    sir_max_db=3.0,
    snr_min_db=5.0,
    snr_max_db=9.0,
    room_share=0.5,
)


def scene(seed: int, episodes: int = 2 * BLOCK, speakers: int = 40) -> Cast:
    """Return a batch as `cast` makes it: all sorts of mixtures, each episode's voices different."""
    rng = np.random.default_rng(seed)
    shape = (episodes, 2, 4)
    there = rng.random(shape) < [0.8, 0.7, 0.4, 0.5]
    there[:, 0, 0] = True
    there[:, :, 1] |= ~there[:, :, 0] | there[:, :, 2]  # somebody speaks, slots fill in order
    mixit = rng.random(episodes) < 0.2
    there[mixit] = [True, True, False, False]
    pick = np.where(there, np.cumsum(there).reshape(shape) - 1, -1)
    names = np.stack([rng.permutation(speakers)[:5] for _ in range(episodes)])
    speaker = np.full(shape, -1)
    speaker[:, :, 0] = names[:, :1]
    speaker[:, :, 1:3] = names[:, 1:].reshape(-1, 2, 2)
    speaker = np.where(there & ~mixit[:, None, None], speaker, -1)
    levels_dbfs = np.where(there, rng.uniform(-40, -20, shape), -np.inf).astype(np.float32)
    fixed = (rng.random((episodes, 2)) < 0.3) | mixit[:, None]
    gains_db = np.where(there, -np.float32(0), -np.inf).astype(np.float32)
    rooms = np.full(shape, -1)
    return Cast(pick, gains_db, levels_dbfs, rooms, speaker, fixed, names[:, 0], mixit)


def remix(share: Share = WHOLE, mixing: MixingConfig = MIXING) -> Remix:
    return Remix(mixing, 7, BLOCK, share, ROOMS)


seeds = st.integers(0, 10_000)


@given(seeds, st.integers(0, 9), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_what_is_there_is_mixed_anew_and_nothing_is_lost(seed: int, epoch: int, step: int) -> None:
    before = scene(seed)
    after = remix()(before, epoch, step)
    assert all(
        np.array_equal(ours, theirs)
        for ours, theirs in zip(after, remix()(before, epoch, step), strict=True)
    )
    for name in ("anchors", "mixit", "fixed"):
        assert np.array_equal(getattr(after, name), getattr(before, name))
    assert np.array_equal(after.pick[:, :, 0], before.pick[:, :, 0])
    assert np.array_equal(after.pick[after.fixed], before.pick[before.fixed])
    for first in range(0, len(before.pick), BLOCK):
        block = slice(first, first + BLOCK)
        assert sorted(after.pick[block].ravel()) == sorted(before.pick[block].ravel())
    assert np.array_equal(np.isfinite(after.gains_db), after.pick >= 0)
    level = dict(zip(before.pick.ravel(), before.levels_dbfs.ravel(), strict=True))
    there = after.pick >= 0
    assert [level[line] for line in after.pick[there]] == after.levels_dbfs[there].tolist()


@given(seeds, st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_nobody_interferes_with_themselves(seed: int, epoch: int) -> None:
    after = remix()(scene(seed, speakers=12), epoch, 0)
    for anchor, rivals in zip(after.anchors, after.speakers[:, :, 1:-1], strict=True):
        known = [int(speaker) for speaker in rivals.ravel() if speaker >= 0]
        assert len(set(known)) == len(known)
        assert anchor not in known
    silent = (after.pick[:, :, :-1] < 0).all(-1)
    assert not silent.any(), "somebody speaks in every mixture"


@given(seeds, st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_levels_are_exactly_those_drawn(seed: int, epoch: int) -> None:
    after = remix()(scene(seed), epoch, 0)
    heard = after.gains_db.astype(np.float64) + after.levels_dbfs
    for place in np.ndindex(after.pick.shape[:2]):
        target, *rivals, noise = heard[place]
        voices = [level for level in rivals if np.isfinite(level)]
        power_db = 10 * np.log10(sum(10 ** (level / 10) for level in voices)) if voices else None
        if np.isfinite(target):
            assert target == pytest.approx(TARGET_LEVEL_DBFS, abs=1e-3)
            assert power_db is None or -3.01 <= target - power_db <= 3.01
        else:
            assert power_db == pytest.approx(TARGET_LEVEL_DBFS, abs=1e-3)
        if np.isfinite(noise):
            assert 4.99 <= TARGET_LEVEL_DBFS - noise <= 9.01


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_ranks_together_make_what_one_makes(seed: int) -> None:
    whole = scene(seed, episodes=4 * BLOCK)
    alone = remix(Share.of(4 * BLOCK))(whole, 1, 5)
    shares = [Share.of(4 * BLOCK, rank, 3, BLOCK) for rank in range(3)]
    parts = [
        remix(share)(Cast(*(field[share.first : share.stop] for field in whole)), 1, 5)
        for share in shares
    ]
    for ours, *theirs in zip(alone, *parts, strict=True):
        assert np.array_equal(ours, np.concatenate(theirs))


def test_epochs_and_steps_differ_and_rooms_are_as_frequent_as_asked() -> None:
    drawn = [remix()(scene(3), epoch, step) for epoch in range(20) for step in range(10)]
    assert len({cast.gains_db.tobytes() for cast in drawn}) == 200
    assert len({cast.pick.tobytes() for cast in drawn}) > 150
    inside = np.array([(cast.rooms >= 0).any(-1) for cast in drawn])[:, ~scene(3).mixit]
    assert inside.mean() == pytest.approx(0.5, abs=0.05)
    for cast in drawn:
        assert not (cast.rooms[:, :, -1] >= 0).any(), "noise is in no room"
        for used in cast.rooms.reshape(-1, 4):
            assert len({int(room) // 2 if room < 2 else 1 for room in used if room >= 0}) <= 1


@pytest.mark.parametrize("speakers", [14, 50, 300])
def test_interferers_move_even_where_speakers_are_few(speakers: int) -> None:
    moved = total = 0
    for seed in range(60):
        before = scene(seed, speakers=speakers)
        after = remix()(before, 0, seed)
        there = (before.pick[:, :, 1] >= 0) & ~before.fixed
        moved += (after.pick[:, :, 1] != before.pick[:, :, 1])[there].sum()
        total += there.sum()
    assert moved / total > 0.4


@given(st.integers(1, 6), st.integers(1, 40), st.data())
def test_shares_cut_no_block_and_are_as_even_as_they_can_be(
    block: int, blocks: int, data: st.DataObject
) -> None:
    world = data.draw(st.integers(1, blocks))
    shares = [Share.of(block * blocks, rank, world, block) for rank in range(world)]
    assert [place for share in shares for place in range(share.first, share.stop)] == [
        *range(block * blocks)
    ]
    assert all(share.size % block == 0 for share in shares)
    counts = [share.size // block for share in shares]
    assert max(counts) - min(counts) <= 1
    with pytest.raises(CscError, match=f"cannot be shared by {blocks + 1} workers"):
        Share.of(block * blocks, 0, blocks + 1, block)
