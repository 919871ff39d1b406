"""JSON without its traps: no duplicate keys, no NaN, no deep nesting, nothing that cannot be written back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewright.formats.errors import FormatError, unreadable

MAX_DEPTH = 64
LFS_PREFIX = b"version https://git-lfs.github.com/spec/"
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_NOT_BRACKETS = bytes(c for c in range(256) if c not in b"[]{}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def strict_json(data: bytes, what: str) -> Any:
    """Parse UTF-8 JSON; `what` names the document in errors.

    Raises FormatError: bad UTF-8 or syntax, a key given twice in one object, NaN or an infinity (also a number
    too large to be one), nesting past 64, half a surrogate pair.
    """
    _check_depth(data, what)
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_pairs(what),
            parse_constant=_constant(what),
            parse_float=_float(what),
        )
    except UnicodeDecodeError as error:
        raise FormatError(f"{what} is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise FormatError(f"{what} is not JSON: {error.msg.lower()} at {place}") from None
    except (ValueError, RecursionError):
        # What json leaves to Python: an integer of more digits than int() takes.
        raise FormatError(f"{what} is not JSON that can be read: a number of too many digits") from None
    if _SURROGATE.search(data):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise FormatError(f"{what} holds half a surrogate pair") from None
    return value


def read_json(path: Path, most: int = 256 * 2**20) -> Any:
    """`strict_json` of a file. Also raises FormatError: absent, not a regular file, an LFS pointer, too large."""
    return strict_json(read_small(path, most), f"`{path}`")


def read_small(path: Path, most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes, links followed. Raises FormatError."""
    size = regular_size(path)
    if size > most:
        raise FormatError(f"`{path}` has {size} bytes, more than the {most} such a file may have")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    if data.startswith(LFS_PREFIX):
        raise pointer_error(path, data)
    return data


def regular_size(path: Path) -> int:
    """Size of a regular file, links followed. Raises FormatError: absent, a dangling link, not a regular file."""
    try:
        info = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise FormatError(
                f"`{path}` is a link to `{path.readlink()}`, which is not there",
                hint="fetch the file again, or point the link at it",
            ) from None
        raise FormatError(f"`{path}` is not there") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"`{path}` cannot be read: {error}") from None
    # Opening a pipe would wait for a writer for ever.
    if not path.is_file():
        raise FormatError(f"`{path}` is not a regular file")
    return info.st_size


def refuse_pointer(path: Path) -> None:
    """Refuse (FormatError) a Git LFS pointer; any other content, and what cannot be read, passes."""
    try:
        with path.open("rb") as file:
            data = file.read(1024)
    except OSError:
        return
    if data.startswith(LFS_PREFIX):
        raise pointer_error(path, data)


def pointer_error(path: Path, data: bytes) -> FormatError:
    """The refusal of a Git LFS pointer, naming the size it stands for."""
    found = re.search(rb"^size (\d{1,20})\s*$", data[:1024], re.MULTILINE)
    size = f"{int(found[1])} bytes" if found else "file"
    return FormatError(
        f"`{path}` is a Git LFS pointer: the {size} it stands for was not fetched",
        hint=f"run `git lfs pull` in `{path.parent}`",
    )


def _check_depth(data: bytes, what: str) -> None:
    brackets = _STRING.sub(b"", data).translate(None, _NOT_BRACKETS)
    # Each round takes the innermost pairs away, at the speed of bytes.replace.
    for _ in range(MAX_DEPTH):
        if not brackets:
            return
        inner = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if len(inner) == len(brackets):
            raise FormatError(f"{what} is not JSON: its brackets do not match")
        brackets = inner
    if brackets:
        raise FormatError(f"{what} is nested more than {MAX_DEPTH} deep")


def _pairs(what: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value] # set.add is the memory here
            raise FormatError(f"{what} gives the key `{printable(twice)}` twice")
        return found

    return build


def _constant(what: str) -> Callable[[str], Any]:
    def refuse(word: str) -> Any:
        raise FormatError(f"{what} holds `{word}`, which is not JSON")

    return refuse


def _float(what: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise FormatError(f"{what} holds a number too large to read: `{text[:40]}`")
        return value

    return parse


def printable(text: str, most: int = 120) -> str:
    """A name from a file as it may stand in one line of an error."""
    safe = "".join(c if c.isprintable() else "?" for c in text[:most])
    return safe + ("..." if len(text) > most else "")
