"""Tables and plots of an evaluation."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from csc_model.metrics import error_rates
from jobs.summary import TARGET_PRIORS
from pipeline.trials import Condition

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
    return bounded({name: 100 * bound for name, bound in interval.items()}, sign)


def bounded(interval: Mapping[str, float], sign: str = "") -> str:
    """Write an interval as `value [low, high]`."""
    value, low, high = (interval[name] for name in ("value", "low", "high"))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def det_plot(
    scores: Mapping[str, Mapping[str, NDArray[np.float64]]], target: NDArray[np.bool_]
) -> bytes:
    """Draw miss against false-alarm rate on normal-deviate axes, a panel for each condition."""
    conditions = list(next(iter(scores.values())))
    columns = min(4, len(conditions))
    rows = -(-len(conditions) // columns)
    figure, panels = pyplot().subplots(
        rows, columns, figsize=(4.2 * columns, 4.4 * rows), squeeze=False, sharey=True
    )
    for panel in panels.flat:
        panel.set_visible(False)
    for panel, condition in zip(panels.flat, conditions, strict=False):
        panel.set_visible(True)
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
    return _png(figure)


def sir_plot(
    results: Sequence[Mapping[str, Any]], conditions: Mapping[str, Condition]
) -> bytes | None:
    """Draw EER with intervals against SIR of one interferer; None where there is but one SIR."""
    sirs = {
        name: its.sir_db
        for name, its in conditions.items()
        if its == Condition(interferers=1, sir_db=its.sir_db)
    }
    if len(sirs) < 2:
        return None
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for system in dict.fromkeys(row["system"] for row in results):
        rows = {row["condition"]: row["eer"] for row in results if row["system"] == system}
        ordered = sorted(sirs, key=lambda name: sirs[name])
        x = [sirs[name] for name in ordered]
        value, low, high = (
            np.array([100 * rows[name][key] for name in ordered])
            for key in ("value", "low", "high")
        )
        errors = (value - low, high - value)
        axes.errorbar(x, value, errors, fmt=f"o{LINES.get(system, '-')}", capsize=3, label=system)
    axes.set(xlabel="SIR (dB)", ylabel="EER (%) with 95 % interval over speakers")
    axes.set_ylim(bottom=0)
    axes.grid(color="0.9")
    axes.legend(frameon=False)
    return _png(figure)


def histogram_plot(scores: Mapping[str, NDArray[np.float64]], target: NDArray[np.bool_]) -> bytes:
    """Draw how scores of target and non-target trials are spread, a panel for each condition."""
    plt = pyplot()
    columns = min(4, len(scores))
    rows = -(-len(scores) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 2.4 * rows), squeeze=False, sharex=True
    )
    for panel in panels.flat:
        panel.set_visible(False)
    for panel, (condition, values) in zip(panels.flat, scores.items(), strict=False):
        panel.set_visible(True)
        bins = np.linspace(values.min(), values.max(), 60)
        for kind, name in ((False, "non-target"), (True, "target")):
            panel.hist(values[target == kind], bins, density=True, alpha=0.6, label=name)
        panel.set(title=condition, yticks=[])
    panels[0][0].legend(frameon=False)
    figure.tight_layout()
    return _png(figure)


def pyplot() -> Any:
    """Return matplotlib's plotting, without a screen."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _png(figure: Any) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110, bbox_inches="tight")
    pyplot().close(figure)
    return sink.getvalue()


def _deviate(rate: NDArray[np.float64]) -> NDArray[np.float64]:
    clipped = torch.from_numpy(np.clip(rate, 1e-6, 1 - 1e-6))
    return np.asarray(torch.special.ndtri(clipped))
