"""Option values of this pass: sizes that name their unit, and machines by preset or file. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

PRESETS = ("t4-gcp-released", "t4-gcp-paper", "h100-pcie5", "h200-pcie5", "rtx4090", "laptop")
# Sizes stay below.
MOST = 2**63
_PREFIXES = {"": 1, **{letter: 1000**power for power, letter in enumerate("kMGTP", 1)}}
_PREFIXES |= {f"{letter}i": 1024**power for power, letter in enumerate("KMGTP", 1)}
NUMBER = r"(-?[0-9]{1,19}(?:\.[0-9]{1,15})?(?:e-?[0-9]{1,2})?) ?"


def quantity(text: str, unit: str) -> Fraction:
    """A number with a prefix and this unit, as `12.9GiB/s` with `B/s`. Raises ValueError: another unit, or none."""
    found = re.fullmatch(NUMBER + r"([kKMGTP]?i?)" + re.escape(unit), text)
    if found is None or found[2] not in _PREFIXES:
        bare = re.fullmatch(NUMBER, text) is not None
        examples = {"B": "`16GiB` or `5GB`", "B/s": "`12.9GiB/s` or `250GB/s`", "FLOP/s": "`21.2TFLOP/s`"}[unit]
        raise ValueError(f"{'has no unit' if bare else 'must be a quantity'}, as {examples}: `{text}`")
    return Fraction(found[1]) * Fraction(_PREFIXES[found[2]])


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes with their unit said, above zero: `16GiB` (2^30), `1.5TB` (10^12), `4096B`; never a bare number."""

    count: int

    @classmethod
    def parse(cls, text: str) -> Memory:
        size = quantity(text, "B")
        if size.denominator > 1 or not 0 < size < MOST:
            raise ValueError(f"must be a size of whole bytes above zero, not `{text}`")
        return cls(int(size))

    def __str__(self) -> str:
        units = {f"{prefix}B": size for prefix, size in _PREFIXES.items()}
        fits = ((self.count // size, unit) for unit, size in units.items() if self.count % size == 0)
        return "{}{}".format(*min(fits))


@dataclass(frozen=True, slots=True)
class MachineName:
    """A preset's name, or a description in a TOML file."""

    word: str

    @classmethod
    def parse(cls, text: str) -> MachineName:
        if text not in PRESETS and not text.endswith(".toml"):
            raise ValueError(f"must be one of {', '.join(PRESETS)} or a .toml file, not `{text}`")
        return cls(text)

    @property
    def file(self) -> Path | None:
        """The file of a description, None for a preset."""
        return None if self.word in PRESETS else Path(self.word)

    def __str__(self) -> str:
        return self.word
