"""What an ingest made of its input: lines and tables for a terminal, and a page for a browser.

The page is one file with its style and drawings inside: it opens from disk, without a network.
"""

import math
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from rich.table import Table
from rich.text import Text

MEANING = {
    "empty": "no bytes, or no samples",
    "unreadable": "no decoder reads it",
    "not_finite": "samples that are not finite numbers",
    "truncated": "damaged or cut off here",
    "crashes_decoder": "the decoder crashes on it",
    "hangs_decoder": "the decoder does not come to an end",
    "missing": "gone since it was listed",
    "changed": "changed since it was listed",
    "denied": "access was refused",
    "no_speech": "nobody speaks",
    "too_short": "too little to use",
    "silent": "too quiet to use",
    "low_snr": "too much noise for the speech",
    "clipped": "overdriven: peaks are cut off",
    "narrowband": "the upper frequencies are missing",
    "tonal": "music or tones, not speech",
    "not_a_response": "not the impulse response of a room",
    "several_speakers": "several people speak",
    "other_speaker": "not the main voice of its recording",
    "duplicate": "an exact copy of another one",
    "near_duplicate": "the same sound as another one",
    "forgotten": "removed on request",
}
MEASURES = {
    "level_dbfs": ("Level", "dBFS"),
    "snr_db": ("Signal-to-noise ratio", "dB"),
    "bandwidth_hz": ("Bandwidth", "Hz"),
    "duration_s": ("Duration", "s"),
}
NONE = "\N{EN DASH}"
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, text direction, halves of characters, breaks
COLUMNS = 100  # of a terminal
BLOCKS = " ▁▂▃▄▅▆▇█"


def summary(index: Mapping[str, Any]) -> list[Table | str]:
    """Return the terminal's view, at most 100 columns wide: strings to say and tables to show."""
    total_s = index["seconds_in"]
    lines = [
        f"{_hours(total_s, total_s)} h in -> {_hours(index['seconds'], total_s)} h kept "
        f"({_share(index)}): {index['files']:,} files -> {index['kept']:,} utterances"
        + _responses(index, " and "),
        f"speakers: {_parts(index['speakers'])}; labels: {_parts(index['labels'])}",
        f"files: {_changes(index)}",
    ]
    view: list[Table | str] = ["\n".join(textwrap.fill(line, COLUMNS) for line in lines)]
    view += [_reasons_table(index)] if index["rejected"] else []
    drawn = [(name, index["histograms"].get(name)) for name in ("level_dbfs", "snr_db")]
    return view + [_bars(name, one) for name, one in drawn if one and any(one["seconds"])]


def _responses(about: Mapping[str, Any], before: str = "") -> str:
    """Say how many room impulse responses were kept, if any; an older index does not know."""
    count = about.get("responses", 0)
    return f"{before}{count:,} room response{'' if count == 1 else 's'}" if count else ""


def _reasons_table(index: Mapping[str, Any]) -> Table:
    table = Table(title="Rejected", title_justify="left", show_footer=True)
    table.add_column("reason", "all", max_width=24, overflow="fold")
    table.add_column("meaning")
    table.add_column("count", f"{sum(index['rejected'].values()):,}", justify="right")
    rejected_s, total_s = index["rejected_seconds"], index["seconds_in"]
    table.add_column("hours", _hours(sum(rejected_s.values()), total_s), justify="right")
    for reason, count in Counter(index["rejected"]).most_common():
        hours = _hours(rejected_s.get(reason), total_s)
        table.add_row(Text(_clean(reason)), MEANING.get(reason, ""), f"{count:,}", hours)
    return table


def _bars(name: str, histogram: Mapping[str, Sequence[float]], rows: int = 3) -> str:
    """Draw a histogram with block characters; an edge is written below where it lies."""
    edges, seconds = histogram["edges"], histogram["seconds"]
    cell = max(2, min(5, (COLUMNS - 12) // len(seconds)))
    title, unit = MEASURES[name]
    lines = [f"{title} ({unit}); the highest bar is {_hours(max(seconds), sum(seconds))} h"]
    eighths = [math.ceil(8 * rows * value / max(seconds)) for value in seconds]
    for row in reversed(range(rows)):
        blocks = (BLOCKS[min(8, max(0, height - 8 * row))] for height in eighths)
        lines.append("      " + "".join(block * (cell - 1) + " " for block in blocks))
    axis = ""
    for place, label in _labels(edges, most=max(2, len(seconds) * cell // 9)).items():
        axis = axis.ljust(6 + place * cell - len(label) // 2) + label
    return "\n".join(line.rstrip() for line in [*lines, axis])


def html(index: Mapping[str, Any]) -> str:
    """Return the report as a page to be stored as UTF-8: whatever the paths hold, it encodes."""
    charts = "".join(_chart(name, one) for name, one in index["histograms"].items())
    generation = f"Generation {_html(index['generation'])}"
    ids = f"id <code>{_html(index['id'])}</code>; store <code>{_html(index['store'])}</code>"
    return (
        f"{HEAD}<header><h1>Ingest report</h1>"
        f"<p>{generation}. Files: {_html(_changes(index))}.</p></header>"
        f"<dl>{''.join(_figures(index))}</dl>"
        f"<h2>Rejected</h2>{_rejected(index) if index['rejected'] else '<p>Nothing.</p>'}"
        f"<h2>By corpus</h2>{_corpora(index) if index['corpora'] else '<p>None.</p>'}"
        f"<h2>What was kept</h2><div class=charts>{charts or '<p>Nothing was measured.</p>'}</div>"
        f"<footer>{generation}, {ids}</footer></main></body></html>\n"
    )


def _figures(index: Mapping[str, Any]) -> Iterator[str]:
    total_s, kept_s, kept = index["seconds_in"], index["seconds"], index["kept"]
    lost_s, speakers, labels = max(0, total_s - kept_s), index["speakers"], index["labels"]
    width = 100 * kept_s / total_s if total_s else 0
    bar = (
        "<svg class=share viewBox='0 0 100 4' preserveAspectRatio=none aria-hidden=true>"
        f"<rect class=rest width=100 height=4 /><rect class=bar width={width:.2f} height=4 /></svg>"
    )
    for name, figure, note in (
        ("Hours in", _hours(total_s, total_s), f"{index['files']:,} files"),
        ("Hours kept", _hours(kept_s, total_s), f"{_hours(lost_s, total_s)} not kept"),
        ("Share kept", _share(index), bar),
        ("Utterances", f"{kept:,}", f"{kept_s / kept:.1f} s on average" if kept else ""),
        ("Speakers", f"{sum(speakers.values()):,}", _html(_parts(speakers))),
        ("Labels", f"{sum(labels.values()):,}", _html(_parts(labels))),
    ):
        yield f"<div><dt>{name}</dt><dd>{figure}</dd><dd class=note>{note}</dd></div>"


def _rejected(index: Mapping[str, Any]) -> str:
    total_s, rows = index["seconds_in"], []
    for reason, count in Counter(index["rejected"]).most_common():
        name = f"<code>{_html(reason)}</code><small>{MEANING.get(reason, '')}</small>"
        hours = _hours(index["rejected_seconds"].get(reason), total_s)
        rows.append((name, f"{count:,}", hours, _example(index["examples"].get(reason))))
    hours = _hours(sum(index["rejected_seconds"].values()), total_s)
    rows.append(("All", f"{sum(index['rejected'].values()):,}", hours, ""))
    return _table("rejected", ("Reason", "Count", "Hours", "An example"), rows)


def _example(example: Mapping[str, Any] | None) -> str:
    """Return where a piece lies and what is known of it."""
    if not example:
        return ""
    path = f"{example['corpus']}/{example['path']}"
    start = f"at {example['start_s']:.2f} s" if example.get("start_s") else ""
    note = _html(": ".join(part for part in (start, example.get("detail")) if part), 240)
    path = f'<code dir=ltr title="{escape(_clean(path))}">{_html(path)}</code>'
    return f"{path}<small dir=auto>{note}</small>"


def _corpora(index: Mapping[str, Any]) -> str:
    rows, total_s = [], index["seconds_in"]
    for name, corpus in index["corpora"].items():
        licence = corpus.get("licence") or "no licence stated"
        about = (licence, corpus.get("language"), _responses(corpus))
        note = _html(", ".join(str(part) for part in about if part))
        hours_in, hours = (_hours(corpus[key], total_s) for key in ("seconds_in", "seconds"))
        name = f"<b dir=auto>{_html(name)}</b><small dir=auto>{note}</small>"
        rows.append((name, f"{corpus['files']:,}", hours_in, hours, _share(corpus)))
    heads = ("Corpus, licence, language", "Files", "Hours in", "Hours kept", "Share")
    return _table("corpora", heads, rows)


def _table(kind: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Set rows of cells that are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table class={kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _chart(name: str, histogram: Mapping[str, Sequence[float]]) -> str:
    """Draw a histogram in hours; bins are equally wide, whatever their edges."""
    title, unit = MEASURES.get(name, (name, ""))
    caption, unit = _html(f"{title}, {unit}" if unit else title), escape(unit)
    edges, hours = histogram["edges"], [value / 3600 for value in histogram["seconds"]]
    if not any(hours):
        return f"<figure><figcaption>{caption}</figcaption><p>Nothing was kept.</p></figure>"
    top, step = _scale(max(hours))
    wide = 318 / len(hours)
    marks = [f"<text x=2 y=10>hours</text><text class=end x=354 y=132>{unit}</text>"]
    for line in range(round(top / step) + 1):
        y = 104 - 82 * line * step / top
        marks.append(f"<path class={'grid' if line else 'axis'} d='M36 {y:.1f}H354'/>")
        marks.append(f"<text class=end x=31 y={y + 3.5:.1f}>{_number(line * step)}</text>")
    for place, value in enumerate(hours):
        tall, left = 82 * value / top, 36.5 + place * wide
        about = f"{_number(edges[place])} to {_number(edges[place + 1])} {unit}: {value:.3g} h"
        marks.append(
            f"<rect class=bar x={left:.2f} y={104 - tall:.2f} width={max(1, wide - 1):.2f} "
            f"height={tall:.2f}><title>{about}</title></rect>"
        )
    for place, label in _labels(edges, most=7).items():
        marks.append(f"<text class=mid x={36 + place * wide:.1f} y=118>{label}</text>")
    return (
        f"<figure><figcaption>{caption}</figcaption><svg viewBox='0 0 366 136' role=img "
        f'aria-label="Histogram: {caption}, in hours">{"".join(marks)}</svg></figure>'
    )


def _labels(edges: Sequence[float], most: int) -> dict[int, str]:
    """Choose the edges to write out, at equal steps and with zero among them."""
    step = math.ceil(len(edges) / most)
    first = list(edges).index(0) % step if 0 in edges else 0
    return {place: _number(edges[place]) for place in range(first, len(edges), step)}


def _scale(peak: float) -> tuple[float, float]:
    """Return the end of an axis and the step of its grid: 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(peak / 2))
    step = next(power * k for k in (1, 2, 5, 10) if power * k * 4 >= peak)
    return step * math.ceil(peak / step), step


def _number(value: float) -> str:
    return f"{value:,g}".replace("-", "\N{MINUS SIGN}")


def _hours(seconds: float | None, total_s: float) -> str:
    """Return hours with as many decimals as suit a total; what is there never reads as zero."""
    if seconds is None:
        return NONE
    decimals = 3 if total_s < 36_000 else 2 if total_s < 3_600_000 else 1
    least = 10.0**-decimals
    if 0 < seconds / 3600 < least:
        return f"under {least:.{decimals}f}"
    return f"{seconds / 3600:,.{decimals}f}"


def _share(about: Mapping[str, Any]) -> str:
    return f"{about['seconds'] / about['seconds_in']:.1%}" if about["seconds_in"] else NONE


def _changes(index: Mapping[str, Any]) -> str:
    forgotten = f"; {index['forgotten']:,} forgotten on request"
    return _parts(index["changes"]) + (forgotten if index["forgotten"] else "")


def _parts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {_clean(name)}" for name, count in counts.items()) or "none"


def _clean(value: object) -> str:
    """Spell out what does not show: it could end a line, turn text round or steer a terminal."""
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in HIDDEN else char
        for char in str(value)
    )


def _html(value: object, most: int = 120) -> str:
    """Escape a text; a long one keeps both its ends."""
    text = _clean(value)
    ends = f"{text[: most // 2]}\N{HORIZONTAL ELLIPSIS}{text[-most // 2 :]}"
    return escape(text if len(text) <= most else ends)


HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Ingest report</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
:root { --paper: #fff; --ink: #1c2430; --soft: #5d6878; --line: #dde2e8; --bar: #3f72a8 }
@media screen and (prefers-color-scheme: dark) { :root {
  --paper: #15191f; --ink: #e4e8ee; --soft: #98a3b3; --line: #303843; --bar: #6fa3d8 } }
body { margin: 0; background: var(--paper); color: var(--ink); font: .94rem/1.45 system-ui,
  "Segoe UI", "Helvetica Neue", Arial, sans-serif; font-variant-numeric: tabular-nums }
* { box-sizing: border-box } main { max-width: 60rem; margin: auto; padding: 2rem 1.25rem }
h1, h2, dd { font-weight: 600; break-after: avoid }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1rem; margin: 1.8rem 0 .4rem }
p, small, dt, .note, th, footer { color: var(--soft) }
dd { font-size: 1.5rem } header p, figure, dd { margin: 0 } footer { margin-top: 2rem }
small { display: block; font-size: .84em } tr, figure { break-inside: avoid }
code { font: .86em ui-monospace, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: repeat(6, auto); gap: 1rem; margin: 1.5rem 0 0;
  padding: 1rem 0; border: solid var(--line); border-width: 1px 0 }
dt, .note, th, footer { font-size: .84rem; font-weight: 400; line-height: 1.35 }
table { width: 100%; border-collapse: collapse } tr { border-bottom: 1px solid var(--line) }
th, td { padding: .32rem 0 .32rem 1rem; text-align: right; vertical-align: top }
:is(th, td):first-child { text-align: left; padding-left: 0 }
.rejected :is(th, td):nth-child(4) { text-align: left; width: 50%; padding-left: 2rem }
.rejected tbody tr:last-child { border: 0; font-weight: 600 }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem 2rem }
svg { display: block; width: 100%; overflow: visible; font-size: 10.5px }
svg.share { height: 5px; margin-top: .45rem } .bar { fill: var(--bar) } .rest { fill: var(--line) }
text { fill: var(--soft) } .end { text-anchor: end } .mid { text-anchor: middle }
.grid { stroke: var(--line) } .axis { stroke: var(--soft) }
@media screen and (max-width: 44rem) {
  dl { grid-template-columns: repeat(3, 1fr) } .charts { grid-template-columns: 1fr }
  .rejected tr { display: grid; grid-template-columns: 1fr 3.5rem 7rem }
  .rejected :is(th, td):nth-child(4) { grid-column: 1 / -1; width: auto; padding: 0 0 .4rem }
  .rejected th:nth-child(4) { display: none } }
@media print { @page { margin: 10mm 14mm } html { font-size: 10px } main { padding: 0 }
  dl, h2, footer { margin-top: .9rem } td { padding-block: .18rem; line-height: 1.3 } }
</style></head><body><main>
"""
