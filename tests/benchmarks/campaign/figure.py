"""Error rates against alpha, the uniform share of p, of systems that learn without labels."""

import io
import os
from collections.abc import Mapping
from pathlib import Path

from csc_model import metrics
from csc_model.metrics import Interval
from pipeline.errors import CscError
from tests.benchmarks.campaign.scoring import Judge, Replicated, replicated
from tests.benchmarks.campaign.systems import BY_ALPHA

FIGURE = Path(__file__).parents[3] / "csc_model/figures/eer_against_alpha.svg"
PANEL_INCHES = (2.2, 2.4)


def by_alpha(root: Path, judge: Judge, to: Path = FIGURE) -> str:
    """Draw the figure of what has been scored, and return its numbers as a table.

    Raises:
        CscError: fewer than two of the systems have been scored.
    """
    config = judge.config
    draws = metrics.draw_speakers(
        len(set(judge.trials.speakers)), config.evaluate.bootstrap_replicates, config.seed
    )
    found = {
        alpha: known
        for alpha, name in BY_ALPHA.items()
        if (known := replicated(root / name, "test", judge, draws)) is not None
    }
    if len(found) < 2:
        raise CscError(
            f"{root} has scores of {len(found)} of {', '.join(BY_ALPHA.values())}: two are needed, "
            "see `run`"
        )
    names = list(judge.trials.conditions)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(draw(intervals(found), names))
    return "\n".join([_table(found, names), os.path.relpath(to)])


def intervals(found: Mapping[float, Replicated]) -> dict[float, list[Interval]]:
    """Return the error rate of each alpha under each condition, with its interval."""
    return {
        alpha: [
            metrics.interval(float(rate), replicates)
            for rate, replicates in zip(one.rates, one.replicates, strict=True)
        ]
        for alpha, one in found.items()
    }


def draw(rates: Mapping[float, list[Interval]], conditions: list[str]) -> bytes:
    """Draw a panel for each condition, as SVG: the same bytes for the same numbers."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    alphas, (width, height) = sorted(rates), PANEL_INCHES
    figure = Figure(figsize=(width * len(conditions), height), layout="constrained")
    panels = figure.subplots(1, len(conditions), squeeze=False)[0]
    for place, (panel, name) in enumerate(zip(panels, conditions, strict=True)):
        known = [rates[alpha][place] for alpha in alphas]
        values = [100 * one.value for one in known]
        below = [100 * (one.value - one.low) for one in known]
        above = [100 * (one.high - one.value) for one in known]
        panel.errorbar(alphas, values, yerr=[below, above], marker="o", markersize=4, capsize=2)
        panel.set(title=name, xlabel="alpha", xticks=alphas)
        panel.set_ylim(0, 110 * max(one.high for one in known))
    panels[0].set_ylabel("EER %")
    drawn = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "alpha", "svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def _table(found: Mapping[float, Replicated], conditions: list[str]) -> str:
    """Return error rates in per cent with intervals; after a comma, less that of the first alpha.

    The difference is paired: over the same draws of speakers.
    """
    first, *_ = found.values()
    lines = [f"| alpha | seeds | {' | '.join(conditions)} |", "|---" * (2 + len(conditions)) + "|"]
    for alpha, one in found.items():
        cells = []
        for place, (rate, replicates) in enumerate(zip(one.rates, one.replicates, strict=True)):
            cell = _percent(metrics.interval(float(rate), replicates))
            if one is not first:
                gap = metrics.interval(
                    float(rate - first.rates[place]), replicates - first.replicates[place]
                )
                cell += f", {_percent(gap, '+')}"
            cells.append(cell)
        lines.append(f"| {alpha} | {one.seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(known: Interval, sign: str = "") -> str:
    return (
        f"{100 * known.value:{sign}.1f} [{100 * known.low:{sign}.1f}, {100 * known.high:{sign}.1f}]"
    )
