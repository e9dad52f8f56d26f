"""Tables and plots of an evaluation."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from csc_model.metrics import error_rates
from jobs.summary import TARGET_PRIORS

TICKS = np.array([0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6])
PRIOR = TARGET_PRIORS[-1]
LINES = {"csc": "-", "untrained": "--", "mfcc": ":"}


def metrics_table(index: Mapping[str, Any]) -> Table:
    """Return the error rates as a table: a row for each condition, a column for each system."""
    results, trials = index["results"], index["trials"]
    systems = list(dict.fromkeys(row["system"] for row in results))
    ours, *others = systems
    table = Table(
        title=f"EER % [95 % interval over {trials['speakers']} speakers], {trials['count']} trials "
        "in each condition",
        title_justify="left",
    )
    table.add_column("condition")
    headings = (f"{ours} - {other}" for other in others)
    for heading in (*systems, *headings, f"minDCF {PRIOR:g}", "SI-SNRi dB"):
        table.add_column(heading, justify="right")
    for condition in dict.fromkeys(row["condition"] for row in results):
        rows = {row["system"]: row for row in results if row["condition"] == condition}
        gaps = [row for row in index["differences"] if row["condition"] == condition]
        gain = index["improvement_db"].get(condition)
        table.add_row(
            condition,
            *(percent(rows[system]["eer"]) for system in systems),
            *(percent(gap["eer"], "+") for gap in gaps),
            f"{rows[ours][f'min_dcf_{PRIOR:g}']:.2f}",
            "" if gain is None else f"{gain:+.1f}",
        )
    return table


def percent(interval: Mapping[str, float], sign: str = "") -> str:
    """Write an interval in per cent, as `value [low, high]`."""
    value, low, high = (100 * interval[name] for name in ("value", "low", "high"))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def det_plot(
    scores: Mapping[str, Mapping[str, NDArray[np.float64]]], target: NDArray[np.bool_]
) -> bytes:
    """Draw miss against false-alarm rate on normal-deviate axes, a panel for each condition."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    conditions = list(next(iter(scores.values())))
    figure, panels = plt.subplots(
        1, len(conditions), figsize=(4.2 * len(conditions), 4.4), squeeze=False, sharey=True
    )
    for panel, condition in zip(panels[0], conditions, strict=True):
        for system, by_condition in scores.items():
            miss, false_alarm = error_rates(by_condition[condition], target)
            panel.plot(_deviate(false_alarm), _deviate(miss), LINES.get(system, "-"), label=system)
        panel.set_xticks(_deviate(TICKS), [f"{100 * tick:g}" for tick in TICKS])
        panel.set_yticks(_deviate(TICKS), [f"{100 * tick:g}" for tick in TICKS])
        limits = _deviate(np.array([0.003, 0.75]))
        panel.set(title=condition, xlabel="false alarms (%)", xlim=limits, ylim=limits)
        panel.plot(limits, limits, color="0.8", linewidth=0.8, zorder=0)
        panel.grid(color="0.9")
    panels[0][0].set_ylabel("misses (%)")
    panels[0][0].legend(frameon=False)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return sink.getvalue()


def _deviate(rate: NDArray[np.float64]) -> NDArray[np.float64]:
    clipped = torch.from_numpy(np.clip(rate, 1e-6, 1 - 1e-6))
    return np.asarray(torch.special.ndtri(clipped))
