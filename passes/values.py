"""Option values with a text form of their own. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GroupSize:
    """How many weights of a row share a scale: a number, or `channel` for the whole row (columns is None)."""

    columns: int | None

    @classmethod
    def parse(cls, text: str) -> GroupSize:
        if text == "channel":
            return cls(None)
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"must be a number of columns or `channel`, not `{text}`")
        return cls(int(text))

    def __str__(self) -> str:
        return "channel" if self.columns is None else str(self.columns)


@dataclass(frozen=True, slots=True)
class Pattern:
    """Where zeros may stand: `unstructured` (both fields None), or `N:M`, which keeps N of every M in a row."""

    keep: int | None = None
    of: int | None = None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        if text == "unstructured":
            return cls()
        keep, colon, of = text.partition(":")
        if not (colon and keep.isdecimal() and of.isdecimal() and 0 < int(keep) < int(of)):
            raise ValueError(f"must be `unstructured` or `N:M` with 0 < N < M, not `{text}`")
        return cls(int(keep), int(of))

    @property
    def sparsity(self) -> float | None:
        """The share of zeros that N:M fixes."""
        return None if self.keep is None or self.of is None else 1 - self.keep / self.of

    def __str__(self) -> str:
        return "unstructured" if self.of is None else f"{self.keep}:{self.of}"
