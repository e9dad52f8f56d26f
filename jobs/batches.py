"""From what the loader reads to what the objective takes, and how a batch is cut for it."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from csc_model.attention import draw_allowed
from csc_model.objective import Episodes
from pipeline.draws import stream_key
from pipeline.loader import Batch
from pipeline.order import Share
from pipeline.render import render
from pipeline.speeds import draw_speeds, played

GONE = 1e-6  # of a line's power: less is the ringing of a filter


def to_episodes(
    batch: Batch,
    bank: Tensor | None,
    seed: int,
    step: int,
    share: Share | None = None,
    speeds: Sequence[float] = (),
    num_speakers: int = 0,
) -> Episodes:
    """Render a batch on its device and draw its share of the global attention masks.

    Without a share, the batch is the global one.

    Nobody attends to a mixture that lacks the anchor, unless nothing else is left. With `speeds`,
    known voices are played at them or as they are; at the n-th, speaker s of `num_speakers` is
    speaker `s + n * num_speakers`.
    """
    sources, speakers, anchors = batch.sources, batch.speakers, batch.anchors
    if speeds:
        which = draw_speeds(len(speeds), batch.pick.shape, seed, step, share)
        which = which.to(speakers.device, non_blocking=True)
        which[:, :, :-1].masked_fill_(speakers < 0, 0)  # several voices in one line, or nobody
        which[:, :, -1] = 0
        before = sources.float().square().mean(-1)
        sources = played(sources, which, speeds)
        after = sources.square().mean(-1)
        gone = ((before > 0) & (after < GONE * before))[:, :, :-1]  # pushed off the end
        anchors = anchors + num_speakers * which[:, :, 0].amax(1)  # 0 where it is absent
        speakers = (speakers + num_speakers * which[:, :, :-1]).masked_fill(gone, -1)
    rendered = render(sources, batch.gains_db, batch.rooms, bank)
    count, conditions = batch.speakers.shape[:2]
    share = share or Share.of(count)
    generator = torch.Generator().manual_seed(stream_key(seed, "attention", step) % 2**63)
    allowed = draw_allowed(share.total, conditions, generator)[share.first : share.stop]
    heard = (batch.speakers[:, :, 0] >= 0).unsqueeze(1)
    itself = torch.eye(conditions, dtype=torch.bool, device=heard.device)
    allowed = allowed.to(heard.device, non_blocking=True) & heard
    allowed |= itself & ~allowed.any(-1, keepdim=True)
    return Episodes(
        rendered.mixtures,
        rendered.references,
        speakers,
        anchors,
        allowed,
        batch.mixit,
    )


def parts(episodes: Episodes, count: int) -> Iterator[Episodes]:
    """Cut a batch into `count` equal parts, for as many passes before one optimizer step."""
    chunks = [None if field is None else field.chunk(count) for field in episodes]
    for place in range(count):
        yield Episodes._make(None if chunk is None else chunk[place] for chunk in chunks)
