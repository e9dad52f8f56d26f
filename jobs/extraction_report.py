"""The figures of target-speaker extraction as cells: for the terminal, and for the page."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from rich.table import Table

from jobs.report import bounded, metrics_table, percent

CELLS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "condition": ("condition", str),
    "voice": ("output", str),
    "SI-SNR dB": ("si_snr_db", bounded),
    "SI-SNRi dB": ("improvement_db", partial(bounded, sign="+")),
    "wrong speaker %": ("wrong_speaker", percent),
    "no gain %": ("no_gain", percent),
    "level dB": ("kept_db", partial(bounded, sign="+")),
    "left if absent dB, mean": ("left_db", bounded),
    "left if absent dB, median": ("left_median_db", "{:.1f}".format),
    "WER %, mixture": ("wer_of_mixture", percent),
    "WER %, output": ("wer", percent),
    "EER %, mixture": ("eer_of_mixture", percent),
    "EER %, extracted": ("eer", percent),
    "difference": ("eer_difference", partial(percent, sign="+")),
}
"""By heading, what a cell says of a row, and how."""

PAGE_ONLY = (
    "no gain %",
    "level dB",
    "WER %, mixture",
    "WER %, output",
    "left if absent dB, mean",
    "difference",
)
BRIEFLY = [heading for heading in CELLS if heading not in PAGE_ONLY]


def tables(index: Mapping[str, Any]) -> Iterator[Table]:
    """Give the tables of an evaluation's index: error rates, and extraction if it was measured."""
    yield metrics_table(index)
    if "extraction" in index:
        yield extraction_table(index["extraction"])


def extraction_title(found: Mapping[str, Any]) -> str:
    """Say what was asked for."""
    return (
        f"Extraction from {found['sides']} test sides of {found['speakers']} speakers [95 % "
        "interval over them]: of who speaks there, and of somebody who does not"
    )


def extraction_rows(found: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Give the cells of each condition and output by their headings, empty where it has none.

    Headings of which no row has any are left out.
    """
    told = {key for row in found["results"] for key in row}
    used = {heading: cell for heading, cell in CELLS.items() if cell[0] in told}
    for row in found["results"]:
        yield {
            heading: spell(row[key]) if key in row else "" for heading, (key, spell) in used.items()
        }


def extraction_table(found: Mapping[str, Any]) -> Table:
    """Return the most telling figures as a table, given those of an evaluation's index."""
    table = Table(title=extraction_title(found), title_justify="left")
    for heading in BRIEFLY:
        table.add_column(heading, justify="left" if heading in BRIEFLY[:2] else "right")
    for cells in extraction_rows(found):
        table.add_row(*(cells.get(heading, "") for heading in BRIEFLY))
    return table
