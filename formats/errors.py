"""What reading and writing files refuses. `cli/exits.py` alone turns a kind into an exit code."""

from __future__ import annotations

import os


class Refusal(Exception):
    """Work that was refused: `message` is one line without a full stop, `hint` says what to do instead."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class FormatError(Refusal):
    """A file that is missing, damaged, hostile or of a kind that is not read."""


class StorageError(Refusal):
    """A disk that is full, a place that may not be written, memory that is short."""


class ConflictError(Refusal):
    """A destination that exists, is locked by a live run, or holds work laid out otherwise."""


class OverlapError(Refusal):
    """A source and a destination that share files."""


def reason(error: OSError) -> str:
    """What the system said, as a part of one of our lines."""
    return (error.strerror or str(error)).lower()


def unreadable(path: str | os.PathLike[str], error: OSError) -> FormatError:
    """A file or folder that the system does not let us read."""
    return FormatError(f"`{path}` cannot be read: {reason(error)}")
