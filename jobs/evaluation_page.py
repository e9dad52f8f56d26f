"""The report of an evaluation: one page that opens from disk, without a server or a network."""

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from jobs.array_examples import ArrayExample
from jobs.examples import KINDS, Example, Sound
from jobs.extraction_report import extraction_rows, extraction_title
from jobs.extraction_summary import NOTHING_DB
from jobs.report import percent
from jobs.summary import TARGET_PRIORS

DEFINITIONS = (
    ("EER", "where as many targets are missed as others are let in, by straight lines on the ROC"),
    ("minDCF p", "least cost at prior p and equal costs, over that of always answering the same"),
    (
        "actDCF p",
        "the same cost when calibrated scores decide; what is above minDCF is calibration",
    ),
    ("Cllr", "cost of calibrated scores in bits: 0 is all known, 1 is nothing"),
    ("same, cross gender", "EER with non-targets of the target's gender, or of the other only"),
    ("SI-SNRi", "what separation adds to the ratio of a voice to the rest, mean over voices"),
    ("[low, high]", "95 % interval by drawing speakers, not trials, again and again"),
)
OF_EXTRACTION = (
    ("nearest slot", "without the extractor: the separated voice that is most like the enrolment"),
    ("SI-SNR", "of the output with the target's voice, -30 to 30 dB: what is lost of a clean one"),
    ("SI-SNRi of an output", "what that is above the SI-SNR of the mixture"),
    ("wrong speaker", "outputs that are nearer, by SI-SNR, to somebody else in the mixture"),
    ("no gain", f"outputs that are not {NOTHING_DB:g} dB nearer to the target than the mixture"),
    ("level", "of the output over the target's own: 0 dB is as loud as that person was"),
    (
        "WER",
        "if there is a recogniser: words that it hears otherwise than in the voice alone",
    ),
    ("left if absent", "level over the mixture, -30 dB at least, if who is asked for is not there"),
    (
        "EER %, extracted",
        "of these pairs alone, by cosines of what was extracted; and of the mixtures, as above",
    ),
)


def page(
    index: Mapping[str, Any],
    plots: Mapping[str, bytes],
    examples: Iterable[Example],
    arrays: Sequence[ArrayExample] = (),
) -> str:
    """Return the page of an evaluation's index, its plots by caption, and its examples."""
    trials = index["trials"]
    facts = (
        f"Model {index['model']}; {trials['count']:,} trials ({trials['targets']:,} of one "
        f"speaker) of {trials['speakers']} speakers, told apart by {trials['speakers_by']}, in "
        f"each condition; trial list {trials['hash']}"
    )
    skipped = "".join(
        f"<p>{escape(name)} was left out: {escape(why)}</p>"
        for name, why in trials["skipped"].items()
    )
    return "".join(
        (
            HEAD,
            f"<header><h1>Verification under interference</h1><p>{escape(facts)}</p></header>",
            "<h2>Error rates</h2>",
            _rates(index),
            skipped,
            "<h2>Against the references</h2>",
            _differences(index),
            _quality(index),
            _extraction(index),
            "<h2>Plots</h2>",
            *(_plot(caption, png) for caption, png in plots.items()),
            "<h2>To listen to</h2>",
            *map(_example, examples),
            "<h2>With several microphones</h2>" if arrays else "",
            *(_heard(example.about, "", example.sounds) for example in arrays),
            "<h2>What the words mean</h2><dl>",
            *(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in _words(index)),
            "</dl></main></body></html>\n",
        )
    )


def _rates(index: Mapping[str, Any]) -> str:
    systems = list(dict.fromkeys(row["system"] for row in index["results"]))
    ours, *others = systems
    costs = [f"{kind}_dcf_{prior:g}" for prior in TARGET_PRIORS for kind in ("min", "act")]
    heads = [
        "Condition",
        *(f"{system}: EER %" for system in systems),
        *(f"{name.replace('_dcf_', 'DCF ')}" for name in costs),
        "Cllr",
        "same gender",
        "cross gender",
        "SI-SNRi, dB",
    ]
    rows = []
    for condition in dict.fromkeys(row["condition"] for row in index["results"]):
        by_system = {
            row["system"]: row for row in index["results"] if row["condition"] == condition
        }
        mine, gain = by_system[ours], index["improvement_db"].get(condition)
        genders = (mine["eer_same_gender"], mine["eer_cross_gender"])
        rows.append(
            [
                condition,
                *(percent(by_system[system]["eer"]) for system in (ours, *others)),
                *(f"{mine[name]:.3f}" for name in costs),
                f"{mine['cllr']:.3f}",
                *("" if rate is None else f"{100 * rate:.1f}" for rate in genders),
                "" if gain is None else f"{gain:+.1f}",
            ]
        )
    return _table(heads, rows)


def _differences(index: Mapping[str, Any]) -> str:
    against = list(dict.fromkeys(row["against"] for row in index["differences"]))
    conditions = list(dict.fromkeys(row["condition"] for row in index["differences"]))
    cells = {
        (row["condition"], row["against"]): percent(row["eer"], "+") for row in index["differences"]
    }
    heads = ["Condition", *(f"EER %, minus that of {name}" for name in against)]
    return _table(heads, [[c, *(cells[c, name] for name in against)] for c in conditions])


def _quality(index: Mapping[str, Any]) -> str:
    if not index["quality"]:
        return ""
    heads = ["Condition", *(f"{m}, {k}" for m in ("PESQ", "STOI") for k in ("mixed", "separated"))]
    rows = [
        [
            condition,
            *(
                f"{found[measure][kind]:.2f}"
                for measure in ("pesq", "stoi")
                for kind in ("mixture", "separated")
            ),
        ]
        for condition, found in index["quality"].items()
    ]
    return f"<h2>Quality of the target's voice</h2>{_table(heads, rows)}"


def _extraction(index: Mapping[str, Any]) -> str:
    if "extraction" not in index:
        return ""
    found = index["extraction"]
    rows = list(extraction_rows(found))
    table = _table(list(rows[0]) if rows else [], [list(cells.values()) for cells in rows])
    return f"<h2>Extraction</h2><p>{escape(extraction_title(found))}</p>{table}"


def _words(index: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return (*DEFINITIONS, *(OF_EXTRACTION if "extraction" in index else ()))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _plot(caption: str, png: bytes) -> str:
    text = escape(caption)
    image = f'<img alt="{text}" src="{_data("image/png", png)}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _example(example: Example) -> str:
    over = f", with {', '.join(example.rivals)} over it" if example.rivals else ""
    about = (
        f"{example.condition}: {example.enrolled} enrolled, {example.tested} heard{over}; score "
        f"{example.score:.2f}, probability of one speaker {example.probability:.0%}"
    )
    return _heard(f"{example.kind}: {KINDS[example.kind]}", about, example.sounds)


def _heard(title: str, about: str, sounds: Iterable[Sound]) -> str:
    return (
        f"<section class=example><h3>{escape(title)}</h3><p>{escape(about)}</p>"
        f"<div class=sounds>{''.join(map(_sound, sounds))}</div></section>"
    )


def _sound(sound: Sound) -> str:
    name = escape(sound.name)
    return (
        f'<figure><img alt="Spectrogram: {name}" src="{_data("image/png", sound.png)}">'
        f'<audio controls preload=metadata src="{_data("audio/mpeg", sound.mp3)}"></audio>'
        f"<figcaption><b>{name}</b> {escape(sound.note)}</figcaption></figure>"
    )


def _data(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{b64encode(data).decode()}"


HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Verification under interference</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:">
<style>
:root { --paper: #fff; --ink: #1c2430; --soft: #5d6878; --line: #dde2e8 }
@media screen and (prefers-color-scheme: dark) { :root {
  --paper: #15191f; --ink: #e4e8ee; --soft: #98a3b3; --line: #303843 } }
body { margin: 0; background: var(--paper); color: var(--ink); font: .94rem/1.45 system-ui,
  "Segoe UI", "Helvetica Neue", Arial, sans-serif; font-variant-numeric: tabular-nums }
* { box-sizing: border-box } main { max-width: 72rem; margin: auto; padding: 2rem 1.25rem }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.1rem; margin: 1.8rem 0 .5rem }
h3 { font-size: .94rem; margin: 0 } p, th, dt, figcaption { color: var(--soft); margin: .2rem 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100% }
tr { border-bottom: 1px solid var(--line) } th { font-weight: 400; font-size: .84rem }
th, td { padding: .3rem 0 .3rem 1rem; text-align: right; white-space: nowrap }
:is(th, td):first-child { text-align: left; padding-left: 0 }
figure { margin: 0 0 1rem } figure img { max-width: 100%; background: #fff }
.example { border-top: 1px solid var(--line); padding: .8rem 0 }
.sounds { display: grid; grid-template-columns: repeat(4, 1fr); gap: 1rem; margin-top: .5rem }
.sounds img { width: 100%; height: 7rem; image-rendering: auto; object-fit: fill }
audio { width: 100%; height: 2.2rem } figcaption { font-size: .84rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem } dd { margin: 0 }
@media screen and (max-width: 44rem) { .sounds { grid-template-columns: 1fr 1fr } }
</style></head><body><main>
"""
