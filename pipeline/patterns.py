"""Patterns of paths, and which names may be those of audio."""

import posixpath
import re
from collections.abc import Collection, Iterator, Sequence

FIELDS = ("speaker", "session", "split", "gender")
UNNAMED = ("", "utterance")
TOKEN = re.compile(r"\{(?P<field>\w*)(?::(?P<glob>[^{}/]*))?\}|\*\*/|\*\*|\*")
WILD = {"*": "[^/]*", "**": ".*", "**/": "(?:.*/)?"}

AUDIO = re.compile(
    r"\.(wav|flac|mp3|ogg|oga|opus|m4a|aac|wma|aif[fc]?|au|snd|caf|w64|rf64|sph|nist|amr|webm|mka)"
)
NOT_AUDIO = re.compile(
    r"\.(txt|csv|tsv|jsonl?|md|rst|log|lst|ya?ml|toml|html?|xml|pdf|py|sh|parquet|np[yz]|jpe?g|png"
    r"|lab|textgrid|trn|ctm|stm|rttm|srt|vtt|scp|gz|tgz|bz2|xz|zip|tar|7z)"
)
NOT_AUDIO_NAMES = ("readme", "license", "licence", "copying", "md5sum", "sha256sums")


def tried(names: Collection[str], ignore: Sequence[str]) -> Iterator[str]:
    """Yield what may be audio: suffixes from the wild lie, so only what surely is not goes."""
    ignored = [path_pattern(text) for text in ignore]
    for name in names:
        if _may_be_audio(name) and not any(one.fullmatch(name) for one in ignored):
            yield name


def is_audio(name: str) -> bool:
    """Return whether the suffix is one that audio has."""
    return bool(AUDIO.fullmatch(posixpath.splitext(name.lower())[1]))


def _may_be_audio(name: str) -> bool:
    if name.startswith(".") or "/." in name:  # hidden, as is what macOS leaves in archives
        return False
    stem, suffix = posixpath.splitext(name.lower())
    if not suffix:
        return posixpath.basename(stem) not in NOT_AUDIO_NAMES
    return not NOT_AUDIO.fullmatch(suffix)


def path_pattern(text: str) -> re.Pattern[str]:
    """Compile a pattern of paths; the fields it has become named groups.

    Raises:
        ValueError: there is no such field, or a brace is left over.
    """
    parts, end, seen = [], 0, set[str]()
    for token in TOKEN.finditer(text):
        parts += [_literal(text[end : token.start()]), _expression(token, seen)]
        end = token.end()
    return re.compile("".join([*parts, _literal(text[end:])]), re.DOTALL)


def _literal(text: str) -> str:
    if "{" in text or "}" in text:
        raise ValueError(f"a brace is left over in {text!r} of a pattern; fields are {{speaker}}")
    return re.escape(text)


def _expression(token: re.Match[str], seen: set[str]) -> str:
    if token[0] in WILD:
        return WILD[token[0]]
    field, glob = token["field"], token["glob"]
    inside = "[^/]+" if glob is None else "[^/]*".join(map(re.escape, glob.split("*")))
    if field in UNNAMED:
        return f"(?:{inside})"
    if field not in FIELDS:
        raise ValueError(f"a pattern has no field {field!r}; use {', '.join(FIELDS)} or {{}}")
    if field in seen:  # the second time it has to be the same
        return f"(?P={field})"
    seen.add(field)
    return f"(?P<{field}>{inside})"
