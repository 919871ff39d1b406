"""Edit the top level of a JSON object as text: what is not changed keeps its bytes, order and indentation."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rewright.formats.errors import FormatError
from rewright.formats.strict import strict_json

_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(slots=True)
class _Member:
    """A key and the spans of its key and its value in the text."""

    key: str
    start: int
    value: int
    end: int


def edit_object(data: bytes, changes: Mapping[str, Any], remove: Collection[str], what: str) -> bytes:
    """The JSON object `data` with `changes` at its top level and the keys of `remove` gone.

    A changed key keeps its place, a new one goes to the end. Raises FormatError for what `strict_json` refuses
    and for a document that is not an object.
    """
    if not isinstance(strict_json(data, what), dict):
        raise FormatError(f"{what} is not an object")
    text = data.decode("utf-8")
    members, close = _members(text)
    indent = _indent(text, members)
    parts: list[str] = []
    seen: set[str] = set()
    for member in members:
        seen.add(member.key)
        if member.key in remove:
            continue
        head = text[member.start : member.value]
        if member.key in changes:
            parts.append(head + _dump(changes[member.key], indent))
        else:
            parts.append(text[member.start : member.end])
    for key, value in changes.items():
        if key not in seen and key not in remove:
            parts.append(f"{json.dumps(key, ensure_ascii=False)}: {_dump(value, indent)}")
    opening = text[: _SPACE.match(text).end() + 1]  # type: ignore[union-attr] # an empty match is a match
    newline = "\r\n" if "\r\n" in text else "\n"
    if indent is None:
        return (opening + ", ".join(parts) + text[close:]).encode("utf-8")
    body = f",{newline}".join(indent + part.replace("\r\n", "\n").replace("\n", newline) for part in parts)
    return (opening + newline + body + (newline if parts else "") + text[close:]).encode("utf-8")


def _members(text: str) -> tuple[list[_Member], int]:
    """The members of the object `text`, already known to be well formed, and where its closing brace stands."""
    decoder = json.JSONDecoder()
    at = _skip(text, _skip(text, 0) + 1)
    members = []
    while text[at] != "}":
        key, colon = decoder.raw_decode(text, at)
        value = _skip(text, _skip(text, colon) + 1)
        _, end = decoder.raw_decode(text, value)
        members.append(_Member(key, at, value, end))
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return members, at


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _indent(text: str, members: list[_Member]) -> str | None:
    """White space before the first member; None when the object is written on one line."""
    if not members:
        return "  "
    before = text[: members[0].start]
    return before.rpartition("\n")[2] if "\n" in before else None


def _dump(value: Any, indent: str | None) -> str:
    """A value as JSON, nested lines indented like the members around it. Raises ValueError for NaN."""
    if indent is None:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    step: str | int = indent if indent else 2
    lines = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=step).split("\n")
    return f"\n{indent}".join(lines)
