"""The summary of an ingest: what it shows, that no text of the data becomes markup, that it opens.

The oracles are Python's own HTML parser and a real browser.
"""

import copy
import io
import re
import shutil
import subprocess
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jobs.ingest_report import MEANING, html, summary

CODES = """
empty unreadable not_finite truncated crashes_decoder hangs_decoder missing changed denied no_speech
too_short silent low_snr clipped narrowband tonal not_a_response several_speakers other_speaker
duplicate near_duplicate forgotten"""
INDEX: dict[str, Any] = {
    "generation": 2,
    "id": "89ab34cd",
    "store": "0123deadbeef",
    "files": 844,
    "changes": {"new": 10, "changed": 1, "gone": 0, "unchanged": 833},
    "kept": 800,
    "seconds": 9000.0,
    "seconds_in": 18000.0,
    "rejected": {"too_short": 12, "low_snr": 30, "odd_new_code": 1},
    "rejected_seconds": {"too_short": 36.0, "low_snr": 7200.0},
    "speakers": {"train": 80, "valid": 14, "test": 31},
    "labels": {"given": 120, "pseudo": 5},
    "corpora": {
        "calls": {
            "files": 844,
            "seconds_in": 18000.0,
            "seconds": 9000.0,
            "licence": "CC BY 4.0",
            "language": "en",
        }
    },
    "histograms": {
        "level_dbfs": {"edges": [-40, -30, -20, -10], "seconds": [0, 7200.0, 1800.0]},
        "snr_db": {"edges": list(range(0, 65, 5)), "seconds": [750.0] * 12},
        "bandwidth_hz": {"edges": [0, 4000, 8000], "seconds": [3600.0, 5400.0]},
        "duration_s": {"edges": [0, 2.5, 5, 20], "seconds": [100.0, 8800.0, 100.0]},
    },
    "examples": {
        "low_snr": {"corpus": "calls", "path": "a/b.wav", "start_s": 1.25, "detail": "2 dB"}
    },
    "forgotten": 0,
}
EMPTY = {
    **dict.fromkeys(("generation", "files", "kept", "seconds", "seconds_in", "forgotten"), 0),
    **{name: {} for name, value in INDEX.items() if isinstance(value, dict)},
    "id": "",
    "store": "",
}
HOSTILE = (
    "<script>alert(1)</script>\"'><img src=https://x.test/ onerror=alert(2)>&lt;\u202e\x1b[31m\n"
)


class Page(HTMLParser):
    """What an HTML parser makes of a page: tags with the names of their attributes, rows, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.rows: list[list[str]] = []
        self.text, self.in_cell = "", False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_cell &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "
        if self.in_cell:
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data}".strip()


def terminal(index: Mapping[str, Any], width: int = 120) -> str:
    screen = Console(file=io.StringIO(), width=width, soft_wrap=True, highlight=False)
    for part in summary(index):
        screen.print(part, markup=not isinstance(part, str))  # as `say` and `show` do
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def hostile(text: str) -> dict[str, Any]:
    """Put a text wherever the data brings text of its own."""
    index = copy.deepcopy(INDEX)
    index["corpora"] = {text: {**INDEX["corpora"]["calls"], "licence": text, "language": text}}
    index["examples"]["low_snr"] |= {"corpus": text, "path": text, "detail": text}
    for name in ("rejected", "speakers", "labels", "changes"):
        index[name][text] = index[name].pop(next(reversed(index[name])))
    index["histograms"][text] = index["histograms"].pop("duration_s")
    return index | {"id": text, "store": text}


def test_meaning_has_words_for_every_code() -> None:
    assert set(MEANING) == set(CODES.split())
    assert all(re.fullmatch(r"[a-z][a-z ,:]+", words) for words in MEANING.values())
    assert len(set(MEANING.values())) == len(MEANING)


def test_room_responses_are_counted_apart() -> None:
    rooms = {**INDEX["corpora"]["calls"], "seconds_in": 0.0, "seconds": 0.0, "responses": 1200}
    index = INDEX | {"responses": 1201, "corpora": INDEX["corpora"] | {"rooms": rooms}}
    assert "800 utterances and 1,201 room responses" in " ".join(terminal(index).split())
    assert "1,200 room responses" in Page(html(index)).text
    assert "response" not in terminal(INDEX)
    assert "room responses" not in Page(html(INDEX)).text


def test_page_shows_sums_shares_and_parts() -> None:
    text = Page(html(INDEX)).text
    for shown in ("5.000", "2.500", "50.0%", "800", "844 files", "125", "80 train, 14 valid"):
        assert shown in text
    for shown in ("10 new, 1 changed, 0 gone, 833 unchanged", "120 given, 5 pseudo", "89ab34cd"):
        assert shown in text


def test_page_shows_every_reason_most_frequent_first() -> None:
    rows = {row[0].split()[0]: row[1:] for row in Page(html(INDEX)).rows}
    assert rows["low_snr"] == ["30", "2.000", "calls/a/b.wav at 1.25 s: 2 dB"]
    assert rows["too_short"] == ["12", "0.010", ""]
    assert rows["odd_new_code"] == ["1", "\N{EN DASH}", ""]
    assert rows["All"] == ["43", "2.010", ""]
    assert list(rows)[1:5] == ["low_snr", "too_short", "odd_new_code", "All"]
    assert rows["calls"] == ["844", "5.000", "2.500", "50.0%"]


@pytest.mark.parametrize("code", MEANING)
def test_both_views_say_what_a_reason_means(code: str) -> None:
    index = INDEX | {"rejected": {code: 1}, "rejected_seconds": {code: 1.0}}
    assert any(f"{code} {MEANING[code]}" == row[0] for row in Page(html(index)).rows if row)
    assert re.search(rf"{code} .* {MEANING[code]} .* 1 .*under 0.001", terminal(index))


def test_terminal_shows_figures_reasons_and_bars_within_its_columns() -> None:
    index = copy.deepcopy(INDEX)
    index["rejected"]["a_code_that_is_unknown_and_longer_than_any_known_one"] = 10**9
    index["speakers"] |= {f"split{number}": number for number in range(20)}
    view = terminal(index)
    assert "5.000 h in -> 2.500 h kept (50.0%): 844 files -> 800 utterances" in view
    for shown in ("80 train", "120 given", "odd_new_code", "Level (dBFS)", "Signal-to-noise"):
        assert shown in view
    assert "longer_than_any_known" in view.replace("\n", "")
    assert max(map(len, view.splitlines())) <= 100


@pytest.mark.parametrize("bins", [1, 2, 12, 40])
def test_bars_of_a_terminal_grow_with_hours_and_stand_over_their_edges(bins: int) -> None:
    edges = [place / bins for place in range(bins + 1)]
    level = {"edges": edges, "seconds": [float(place + 1) for place in range(bins)]}
    drawn = str(summary(INDEX | {"histograms": {"level_dbfs": level}})[-1]).splitlines()
    bottom, axis = drawn[-2], drawn[-1]
    assert max(map(len, drawn)) <= 100
    assert bottom[6] != " "
    assert list(bottom.replace(" ", "")) == sorted(bottom.replace(" ", ""))
    assert axis[6] == "0"


def test_bars_of_a_page_are_as_high_as_their_hours() -> None:
    heights = re.findall(r"<rect class=bar x=\S+ y=\S+ width=\S+ height=([\d.]+)>", html(INDEX))
    seconds = [value for one in INDEX["histograms"].values() for value in one["seconds"]]
    assert len(heights) == len(seconds)
    nothing, high, low = (float(height) for height in heights[:3])
    assert nothing == 0
    assert high == pytest.approx(4 * low, abs=0.02)
    for unit in ("Level, dBFS", "Signal-to-noise ratio, dB", "Bandwidth, Hz", "Duration, s"):
        assert f"<figcaption>{unit}</figcaption>" in html(INDEX)


@given(peak=st.floats(1e-9, 1e12))
def test_any_hours_fit_their_chart(peak: float) -> None:
    page = html(INDEX | {"histograms": {"snr_db": {"edges": [0, 1], "seconds": [peak]}}})
    (height,) = re.findall(r"<rect class=bar x=\S+ y=\S+ width=\S+ height=([\d.]+)>", page)
    assert 40 < float(height) <= 82
    assert 2 <= page.count("class=grid") + page.count("class=axis") <= 5


def test_nothing_at_all_can_be_shown() -> None:
    page = Page(html(EMPTY))
    assert page.rows == []
    assert "Nothing was measured" in page.text
    assert "0.000 h in -> 0.000 h kept (\N{EN DASH})" in terminal(EMPTY)
    silent = {"level_dbfs": {"edges": [-60, -50], "seconds": [0]}}
    assert "Nothing was kept" in html(EMPTY | {"histograms": silent})
    assert len(summary(EMPTY | {"histograms": silent})) == 1


@given(text=st.text(st.characters(exclude_categories=[])).map("~{}".format))  # no known name
def test_text_of_the_data_never_becomes_markup(text: str) -> None:
    page = html(hostile(text)).encode()  # a file's name may not be UTF-8: the page is
    assert Page(page.decode()).tags == Page(html(hostile("plain"))).tags


def test_hostile_text_is_shown_as_it_is() -> None:
    visible = HOSTILE.replace("\u202e", r"\u202e").replace("\x1b", r"\x1b").replace("\n", r"\n")
    assert visible in Page(html(hostile(HOSTILE))).text
    view = terminal(hostile("[red]\x1b[31m\udc80"))
    assert "\x1b" not in view
    assert view.count(r"[red]\x1b[31m\udc80") == 4  # speakers, labels, changes, reasons
    assert view.encode()


def test_a_long_path_keeps_its_ends_and_is_whole_in_a_tooltip() -> None:
    path = "first/" + "x" * 4000 + "/last.wav"
    index = INDEX | {"examples": {"low_snr": {"corpus": "calls", "path": path}}}
    assert f'title="calls/{path}"' in html(index)
    text = Page(html(index)).text
    assert "calls/first/xxx" in text
    assert "x/last.wav" in text
    assert path not in text


def browse(page: Path) -> tuple[str, list[str]]:
    """Open a page in Chromium without a network; return its DOM and what its console said."""
    chromium = shutil.which("chromium")
    assert chromium
    done = subprocess.run(
        [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--disable-background-networking", "--enable-logging=stderr"),
            *("--host-resolver-rules=MAP * 0.0.0.0", f"--user-data-dir={page.parent / 'profile'}"),
            *("--virtual-time-budget=2000", "--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on the PATH")
def test_page_opens_in_a_browser_and_asks_for_nothing(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(html(hostile(HOSTILE)), encoding="utf-8")
    dom, console = browse(page)
    tags = [tag for tag, *_ in Page(dom).tags]
    expected = {"table": 2, "tr": 7, "svg": 5, "figure": 4, "img": 0, "script": 0}
    assert {tag: tags.count(tag) for tag in expected} == expected
    assert console == []
    attributes = {name for _, *names in Page(dom).tags for name in names}
    assert not attributes & {"src", "srcset", "href", "action", "data", "poster", "style"}
    assert not re.search(r"url\(|@import", html(INDEX))

    page.write_text(html(INDEX).replace("<header>", "<header><img src=http://x.test/a.png>"))
    assert any("x.test" in line for line in browse(page)[1])  # a request would have been seen
