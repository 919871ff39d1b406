"""What a search must know of a model: its caches by layer and its weights by class. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["dense", "expert", "head", "embedding"]
# Numbers that share a scale and a least value, both of 16 bits, where weights or a cache are quantised.
GROUP = 64


def quantised(numbers: int, bits: int) -> int:
    """Bytes of numbers at so many bits, in groups of 64 with scale and least value (arXiv:2303.06865, section 5.1)."""
    return numbers * 2 if bits == 16 else -(-numbers * (bits * GROUP + 32) // (8 * GROUP))


@dataclass(frozen=True, slots=True)
class Cache:
    """What a layer keeps of each sequence, and what a new token costs it.

    `numbers` is kept of a token, `window` the most tokens that are kept (None: all), `state` bytes that do not grow.
    `query` numbers go to attention for a new token and `out` come back; `flops` are spent on it for each token kept.
    """

    kind: str
    numbers: int = 0
    window: int | None = None
    state: int = 0
    query: int = 0
    out: int = 0
    flops: int = 0

    @property
    def attends(self) -> bool:
        """Whether a new token attends to keys and values that are kept, which a CPU can do."""
        return self.numbers > 0 and self.kind != "convolution"

    def tokens(self, context: int) -> int:
        """Tokens that are kept of a context."""
        return context if self.window is None else min(context, self.window)

    def token_bytes(self, bits: int) -> int:
        """Bytes that are kept of a token."""
        return quantised(self.numbers, bits) if self.numbers else 0

    def peak(self, context: int, bits: int) -> int:
        """Bytes of a sequence at the end of its context."""
        return self.tokens(context) * self.token_bytes(bits) + self.state

    def mean(self, prompt: int, generate: int) -> float:
        """Tokens that decoding reads on average, from the second generated token on: near prompt + generate / 2."""
        steps = max(1, generate - 1)
        first, last = prompt + 1, prompt + steps
        if self.window is None or last <= self.window:
            return (first + last) / 2
        if first >= self.window:
            return float(self.window)
        below = self.window - first
        return (below * (first + self.window - 1) / 2 + (steps - below) * self.window) / steps

    def pairs(self, prompt: int) -> float:
        """Pairs of tokens that attend to each other in a prompt, each to itself and those before it in the window."""
        if self.window is None or prompt <= self.window:
            return prompt * (prompt + 1) / 2
        return self.window * (self.window + 1) / 2 + (prompt - self.window) * self.window


@dataclass(frozen=True, slots=True)
class Piece:
    """A module of a layer, or of what stands outside them (layer -1); `rows` are a slice of all its tensors."""

    layer: int
    tensors: tuple[str, ...]
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """Pieces of equal size that are placed one by one: `nbytes` each, `numbers` weights that a token multiplies by.

    `plain`: stored as floats, so that fewer bits are possible. `sparse`: predictors say what of it is read.
    """

    kind: Kind
    role: str
    nbytes: int
    numbers: int
    plain: bool
    pieces: tuple[Piece, ...]
    sparse: bool = False

    @property
    def count(self) -> int:
        return len(self.pieces)

    def at(self, bits: int | None) -> int:
        """Bytes of a piece at so many bits a weight, or as stored; never more than stored."""
        if bits is None or not self.plain or self.kind in ("embedding", "head"):
            return self.nbytes
        return min(self.nbytes, quantised(self.numbers, bits))


@dataclass(frozen=True, slots=True)
class Sparsity:
    """What predictors of `nbytes` leave: a step of up to `rows` tokens reads `share` of sparse units for each token."""

    share: float
    rows: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Model:
    """A model to place. `fixed` tensors are small, and stay on the GPU; `idle` ones no forward reads.

    `tied`: the embedding is the head too. `reused` of `experts` are used by each token. `ffn` numbers are the widest
    between two matrices of a layer, `query` the widest that attention takes of a token.
    """

    arch: str
    dtype: str
    digest: str
    hidden: int
    vocabulary: int
    ffn: int
    query: int
    positions: int | None
    tied: bool
    experts: int
    reused: int
    caches: tuple[Cache, ...]
    units: tuple[Unit, ...]
    fixed: tuple[str, ...]
    fixed_bytes: int
    idle: tuple[str, ...]
    idle_bytes: int
    total_bytes: int
    heads: int
    gated: bool
    sparsity: Sparsity | None = None
    notes: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        return len(self.caches)

    def of(self, *kinds: Kind) -> Iterator[Unit]:
        """The classes of these kinds."""
        return (unit for unit in self.units if unit.kind in kinds)
