"""Option values with a text form of their own. Standard library only.

One that stands for a file has it as `file`, and one for a checkpoint as `checkpoint`: what is in them enters the key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import ClassVar, Literal, get_args

from rewright.formats import peft, predictors

# Bits of a code that the packed format and its readers know.
CODE_BITS = (2, 3, 4, 8)
UNQUANTISED = 16
_UNITS = {f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", 1)}
_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}


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


@dataclass(frozen=True, slots=True)
class Bits:
    """Bits of a code: 2, 3, 4 or 8, 16 for weights that stay as they are, or an average between 2 and 8."""

    number: int | float

    @classmethod
    def parse(cls, text: str) -> Bits:
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if number in CODE_BITS or number == UNQUANTISED:
            return cls(int(number))
        if CODE_BITS[0] < number < CODE_BITS[-1]:
            return cls(number)
        raise ValueError(f"must be 2, 3, 4, 8, 16 or an average between 2 and 8, not `{text}`")

    @property
    def whole(self) -> bool:
        """Whether every matrix can have just this many."""
        return self.number in CODE_BITS or self.number == UNQUANTISED

    def __str__(self) -> str:
        return str(int(self.number)) if self.number == int(self.number) else str(self.number)


@dataclass(frozen=True, slots=True)
class Regex:
    """A regular expression that is looked for anywhere in a name."""

    expression: str

    @classmethod
    def parse(cls, text: str) -> Regex:
        _compiled(text)
        return cls(text)

    def found_in(self, name: str) -> bool:
        return re.search(self.expression, name) is not None

    def __str__(self) -> str:
        return self.expression


@dataclass(frozen=True, slots=True)
class ByteSize:
    """A number of bytes, at least 1: `5GB` (10^9), `16GiB` (2^30), `1.5GB`, or digits alone."""

    count: int

    @classmethod
    def parse(cls, text: str) -> ByteSize:
        found = re.fullmatch(r"([0-9]{1,19}(?:\.[0-9]{1,15})?) ?((?:[kMGT]|[KMGT]i)?B)?", text)
        size = Fraction(found[1]) * _UNITS.get(found[2], 1) if found else Fraction(0)
        if size.denominator > 1 or not 0 < size < 2**63:
            raise ValueError(f"must be a size as `5GB`, `16GiB` or whole bytes, not `{text}`")
        return cls(int(size))

    def __str__(self) -> str:
        fits = ((self.count // size, unit) for unit, size in _UNITS.items() if self.count % size == 0)
        return "{}{}".format(*min(fits, default=(self.count, "")))


@dataclass(frozen=True, slots=True)
class BitsFor:
    """Bits for the matrices whose names a regular expression is found in: `REGEX=N`."""

    expression: str
    bits: int

    @classmethod
    def parse(cls, text: str) -> BitsFor:
        expression, said = _assignment(text)
        if said not in (*map(str, CODE_BITS), str(UNQUANTISED)):
            raise ValueError(f"must end in `=2`, `=3`, `=4`, `=8` or `=16`, not in `={said}`")
        return cls(expression, int(said))

    def __str__(self) -> str:
        return f"{self.expression}={self.bits}"


@dataclass(frozen=True, slots=True)
class SparsityFor:
    """The share of zeros for the matrices whose names a regular expression is found in: `REGEX=F`."""

    expression: str
    sparsity: float

    @classmethod
    def parse(cls, text: str) -> SparsityFor:
        expression, said = _assignment(text)
        try:
            sparsity = float(said)
        except ValueError:
            sparsity = float("nan")
        if not 0 <= sparsity < 1:
            raise ValueError(f"must end in a share from 0 to below 1, not in `={said}`")
        return cls(expression, sparsity)

    def __str__(self) -> str:
        return f"{self.expression}={self.sparsity!r}"


def _assignment(text: str) -> tuple[str, str]:
    """Both sides of the last `=`; the left is a regular expression. Raises ValueError."""
    expression, equals, said = text.rpartition("=")
    if not (equals and expression):
        raise ValueError(f"must be a regular expression, `=` and a number, not `{text}`")
    _compiled(expression)
    return expression, said.strip()


def _compiled(expression: str) -> re.Pattern[str]:
    """The regular expression. Raises ValueError."""
    try:
        return re.compile(expression)
    except re.error as error:
        raise ValueError(f"`{expression}` is not a regular expression: {error}") from None


@dataclass(frozen=True, slots=True)
class ModelPath:
    """Another checkpoint."""

    checkpoint: Path

    @classmethod
    def parse(cls, text: str) -> ModelPath:
        if not text:
            raise ValueError("must not be empty")
        return cls(Path(text))

    def __str__(self) -> str:
        return str(self.checkpoint)


@dataclass(frozen=True, slots=True)
class PredictorFolder:
    """A folder of predictors of another system, a file a layer."""

    folder: Path

    @classmethod
    def parse(cls, text: str) -> PredictorFolder:
        if not text:
            raise ValueError("must not be empty")
        return cls(Path(text))

    @property
    def files(self) -> dict[int, Path]:
        """The files by layer. Raises FormatError."""
        return predictors.by_layer(self.folder)

    def __str__(self) -> str:
        return str(self.folder)


@dataclass(frozen=True, slots=True)
class PromptStart:
    """What a learned prompt begins as: `vocab`, `text`, `random`, or a prompt's file, or a folder that has one."""

    word: str

    WORDS: ClassVar = ("vocab", "text", "random")

    @classmethod
    def parse(cls, text: str) -> PromptStart:
        if not text:
            raise ValueError(f"must be {', '.join(f'`{word}`' for word in cls.WORDS)} or a prompt's file")
        return cls(text)

    @property
    def file(self) -> Path | None:
        """The file that holds a prompt, None for a word. Raises FormatError for a folder that has none."""
        return None if self.word in self.WORDS else peft.found_in(Path(self.word))

    def __str__(self) -> str:
        return self.word


@dataclass(frozen=True, slots=True)
class StateOrder:
    """How many real states a recurrence has at most: an even number, or `auto` (states is None)."""

    states: int | None

    @classmethod
    def parse(cls, text: str) -> StateOrder:
        if text == "auto":
            return cls(None)
        if not text.isdecimal() or int(text) < 2 or int(text) % 2:
            raise ValueError(f"must be an even number of states or `auto`, not `{text}`")
        return cls(int(text))

    def __str__(self) -> str:
        return "auto" if self.states is None else str(self.states)


Method = Literal["dense", "predicted", "oracle", "random", "static", "teal", "griffin"]


@dataclass(frozen=True, slots=True)
class Methods:
    """Ways to choose what a sparse decoder reads."""

    names: tuple[Method, ...]

    @classmethod
    def parse(cls, text: str) -> Methods:
        words = [word.strip() for word in text.split(",")]
        known: tuple[Method, ...] = get_args(Method)
        odd = [word for word in words if word not in known]
        if odd:
            raise ValueError(f"must be some of {', '.join(known)}, not `{odd[0]}`")
        return cls(tuple(name for name in known if name in words))

    def __str__(self) -> str:
        return ",".join(self.names)
