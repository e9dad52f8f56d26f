"""The systems that are compared, each as the stages of its training.

A stage is a dataset, a number of steps and what differs from the configuration of the campaign.
Steps are chosen for about 2,000 core-seconds on the machine of the published results.
"""

from typing import Literal, NamedTuple

SEPARATION_STEPS, HEAD_STEPS = 5100, 2000
NO_SEPARATION_STEPS = 3800
PAIRS = (
    "build.mixing.interferer_shares=[0.0, 1.0]",
    "build.mixing.noise_share=0.0",
    "build.mixing.sir_max_db=5.0",
)


class Stage(NamedTuple):
    """One training, which begins with the weights of the stage before."""

    dataset: Literal["pairs", "wild"]
    steps: int
    changes: tuple[str, ...] = ()


SEPARATION = Stage(
    "pairs",
    SEPARATION_STEPS,
    ("train.contrastive_weight=0.0", "train.views=0", "train.speeds=[0.9, 1.1]"),
)
FROZEN = ("train.freeze_separator=true", "train.init_from='the stage before'")
HEAD = Stage("wild", HEAD_STEPS, FROZEN)


def _contrast(*changes: str, views: int = 0) -> tuple[Stage, Stage]:
    """Return CSC with another loss: sets that compare vectors with each other hear all views."""
    base = ("train.contrast.margin=0.0", f"train.views={views}")
    return SEPARATION, HEAD._replace(steps=HEAD_STEPS // 2, changes=(*FROZEN, *base, *changes))


CSC_SYSTEMS: dict[str, tuple[Stage, ...]] = {
    "csc": (SEPARATION, HEAD),
    "csc_gaussian": (
        SEPARATION,
        HEAD._replace(
            changes=(
                *FROZEN,
                "train.contrast.kernel='gaussian'",
                "train.contrast.margin=0.0",
                "train.contrast.scale=10.0",
                "train.contrast.learn_scale=true",
            )
        ),
    ),
    "csc_all_views": (
        SEPARATION,
        HEAD._replace(steps=HEAD_STEPS // 2, changes=(*FROZEN, "train.views=0")),
    ),
    "csc_no_attention": (SEPARATION, HEAD._replace(changes=(*FROZEN, "train.attend=false"))),
    "csc_no_separation": (
        Stage(
            "wild",
            NO_SEPARATION_STEPS,
            ("train.separation_weight=0.0", "model.detach_separation=false"),
        ),
    ),
    "csc_table": _contrast(),
    "csc_batch": _contrast("train.contrast.set='batch'"),
    "csc_in_mix": _contrast("train.contrast.set='in_mix'"),
    "csc_label_free": _contrast("train.contrast.set='batch'", "train.contrast.label_free=true"),
}
"""Ablations whose head hears all views take half the steps, each of which costs twice as much."""

PEERS = {"ecapa": 9000, "same_trunk": 15000}
"""Plain networks on the mixture as it is, trained with AAM-softmax on the anchor; their steps."""
