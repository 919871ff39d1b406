"""Option values of `dejavu-predictor-train`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from rewright.passes.models.sites import TARGETS, Target

# Rows that a decoder's step can be made for.
MOST_ROWS = 16


@dataclass(frozen=True, slots=True)
class Rank:
    """The rank of a predictor, or `auto` (count is None)."""

    count: int | None

    @classmethod
    def parse(cls, text: str) -> Rank:
        if text == "auto":
            return cls(None)
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"must be a whole number or `auto`, not `{text}`")
        return cls(int(text))

    def __str__(self) -> str:
        return "auto" if self.count is None else str(self.count)


@dataclass(frozen=True, slots=True)
class Targets:
    """What is read sparsely: some of `mlp`, `heads`, `inputs`; empty for `auto`."""

    names: tuple[Target, ...]

    @classmethod
    def parse(cls, text: str) -> Targets:
        if text == "auto":
            return cls(())
        words = [word.strip() for word in text.split(",")]
        odd = [word for word in words if word not in TARGETS]
        if odd:
            raise ValueError(f"must be `auto` or some of {', '.join(TARGETS)}, not `{odd[0]}`")
        return cls(tuple(target for target in TARGETS if target in words))

    def __str__(self) -> str:
        return ",".join(self.names) or "auto"


@dataclass(frozen=True, slots=True)
class Buckets:
    """Numbers of rows, ascending, beginning with 1."""

    rows: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Buckets:
        words = [word.strip() for word in text.split(",")]
        odd = [word for word in words if not (word.isdecimal() and 1 <= int(word) <= MOST_ROWS)]
        if odd:
            raise ValueError(f"must be numbers from 1 to {MOST_ROWS}, not `{odd[0]}`")
        return cls(tuple(sorted({1, *map(int, words)})))

    def __str__(self) -> str:
        return ",".join(map(str, self.rows))
