"""Cron expressions, in the part of their grammar that Kubernetes and crontabs share."""

import calendar
import difflib
import re
import zoneinfo
from typing import NamedTuple

from pipeline.errors import CscError

ITEM = re.compile(
    r"(?P<all>\*)|(?P<first>[0-9]+|[a-z]{3})(?:-(?P<last>[0-9]+|[a-z]{3}))?", re.ASCII
)
ANY_DAY = re.compile(r"\*(/0*1)?")  # as a step of 1 leaves none out
LEAP_YEAR = 2024


class _Field(NamedTuple):
    name: str
    low: int
    high: int
    words: str = ""  # that stand for low, low + 1, ...


MINUTE, HOUR = _Field("minute", 0, 59), _Field("hour", 0, 23)
DAY = _Field("day of the month", 1, 31)
MONTH = _Field("month", 1, 12, "jan feb mar apr may jun jul aug sep oct nov dec")
WEEKDAY = _Field("day of the week", 0, 6, "sun mon tue wed thu fri sat")
FIELDS = (MINUTE, HOUR, DAY, MONTH, WEEKDAY)


def checked_cron(expression: str) -> str:
    """Return an expression of five fields with single spaces between them.

    A field is `*`, a number, a range or a list of them; `*` and a range may have a step. Months and
    days of the week may be named by three letters; Sunday is 0.

    Raises:
        CscError: it is no such expression, or no day answers to it; the field is named.
    """
    words = expression.split()
    if len(words) != len(FIELDS):
        names = ", ".join(field.name for field in FIELDS)
        raise CscError(
            f"--cron {expression!r} has {len(words)} fields: give five ({names}), as in "
            "'0 3 * * *' for three in the morning"
        )
    meant = {field: _values(word, field) for word, field in zip(words, FIELDS, strict=True)}
    longest = max(calendar.monthrange(LEAP_YEAR, month)[1] for month in meant[MONTH])
    if any(map(ANY_DAY.fullmatch, words[4].split(","))) and min(meant[DAY]) > longest:
        raise CscError(f"--cron {expression!r}: no such month has a day {min(meant[DAY])}")
    return " ".join(words)


def _values(word: str, field: _Field) -> set[int]:
    return set().union(*(_item(item, word, field) for item in word.split(",")))


def _item(item: str, word: str, field: _Field) -> range:
    text, slash, step = item.lower().partition("/")
    match = ITEM.fullmatch(text)
    if match is None:
        raise _error(word, field, f"{item!r} is no number, range or *")
    first, last = match["first"] or str(field.low), match["last"]
    low = _number(first, word, field)
    high = field.high if match["all"] else _number(last or first, word, field)
    if low > high:
        raise _error(word, field, f"the range {text} runs backwards")
    if not slash:
        return range(low, high + 1)
    if not (match["all"] or last):
        raise _error(word, field, f"a step goes with * or a range, as in {low}-{field.high}/{step}")
    if not re.fullmatch("[0-9]+", step) or not 1 <= int(step) <= field.high - field.low:
        raise _error(word, field, f"the step {step!r} is not from 1 to {field.high - field.low}")
    return range(low, high + 1, int(step))


def _number(text: str, word: str, field: _Field) -> int:
    names = field.words.split()
    number = names.index(text) + field.low if text in names else text
    if isinstance(number, str) and not number.isdecimal():
        known = f", or {' '.join(names)}" if names else ""
        raise _error(word, field, f"{text!r} is no number{known}")
    if not field.low <= int(number) <= field.high:
        first = f" ({names[0]} is {field.low})" if names else ""
        raise _error(word, field, f"{text} is not from {field.low} to {field.high}{first}")
    return int(number)


def _error(word: str, field: _Field, reason: str) -> CscError:
    return CscError(f"--cron: {field.name} {word!r}: {reason}")


def checked_time_zone(name: str) -> str:
    """Return the name of a time zone, as in `Europe/Berlin`.

    Raises:
        CscError: there is none of that name.
    """
    known = zoneinfo.available_timezones()
    if known and name not in known:  # a small image may have no list of them
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}?" if close else "write it as in Europe/Berlin"
        raise CscError(f"--time-zone {name!r}: there is no such time zone; {hint}")
    return name
