"""One price for everything that may be left unread: what a run reads, and what that costs, at a price a byte.

Neurons, groups of heads and columns, of all layers, are left out where that costs less than the price times the bytes
it saves. So one number settles every threshold, and a layer keeps what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rewright.passes.dejavu_predictor_train.collect import LOWEST, PER_OCTAVE, STEPS, Histogram
from rewright.passes.dejavu_predictor_train.curves import Curves
from rewright.passes.dejavu_predictor_train.spec import HALVINGS
from rewright.passes.models.sites import Site

# Octaves of a price below and above which nothing changes, and halvings of them.
BOTTOM, TOP = LOWEST, LOWEST + STEPS / PER_OCTAVE


@dataclass(frozen=True, slots=True)
class Units:
    """Neurons or groups of heads of a layer, each of `unit_bytes`."""

    curves: Curves
    unit_bytes: int

    @property
    def total(self) -> float:
        return float(self.curves.units * self.unit_bytes)

    def spent(self, price: float) -> tuple[float, float]:
        """Bytes that a token reads, and the cost of what it does not."""
        _, read, cost = self.settled(price)
        return float(read.sum()) * self.unit_bytes, float(cost.sum())

    def settled(self, price: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each unit's threshold, share of tokens on which it is read, and cost."""
        if price < 0:
            return self.curves.at(torch.zeros(self.curves.units, dtype=torch.int64))
        return self.curves.at(self.curves.taken(torch.full((self.curves.units,), price * self.unit_bytes)))

    @property
    def whole(self) -> float:
        """The cost of leaving all of them out."""
        return float(self.curves.whole.sum())


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns at a site, each of `unit_bytes`, by the histogram of what its numbers cost."""

    histogram: Histogram
    columns: int
    unit_bytes: int

    @property
    def total(self) -> float:
        return float(self.columns * self.unit_bytes)

    def spent(self, price: float) -> tuple[float, float]:
        """As `Units.spent`; within a step of the histogram numbers are taken to lie evenly."""
        if price <= 0:
            return self.total, 0.0
        place = min(
            max((float(torch.tensor(price, dtype=torch.float64).log2()) - LOWEST) * PER_OCTAVE, 0.0), float(STEPS)
        )
        whole, part = int(place), place - int(place)
        count = float(self.histogram.count[:whole].sum())
        cost = float(self.histogram.cost[:whole].sum())
        if whole < STEPS:
            count += part * float(self.histogram.count[whole])
            cost += part * float(self.histogram.cost[whole])
        tokens = max(1, self.histogram.tokens)
        return self.total - count / tokens * self.unit_bytes, cost / tokens

    @property
    def whole(self) -> float:
        return float(self.histogram.cost.sum()) / max(1, self.histogram.tokens)


@dataclass(frozen=True, slots=True)
class LayerUnits:
    """All that may be left unread in a layer."""

    neurons: Units | None
    groups: Units | None
    columns: dict[Site, Columns]

    @property
    def parts(self) -> list[Units | Columns]:
        return [part for part in (self.neurons, self.groups, *self.columns.values()) if part is not None]

    def spent(self, price: float) -> tuple[float, float]:
        """Bytes that a token reads of the layer, and the cost of what it does not."""
        found = [part.spent(price) for part in self.parts]
        return sum(size for size, _ in found), sum(cost for _, cost in found)

    @property
    def total(self) -> float:
        return sum(part.total for part in self.parts)

    @property
    def whole(self) -> float:
        return sum(part.whole for part in self.parts)


@dataclass(frozen=True, slots=True)
class Settled:
    """Prices by layer (negative: everything is read), the share of the targeted bytes that a token reads, and the
    cost."""

    prices: tuple[float, ...]
    share: float
    cost: float


@dataclass(frozen=True, slots=True)
class Market:
    """The layers of a model; with `even` each reads the same share, else all pay one price."""

    layers: Sequence[LayerUnits]
    even: bool = False

    @property
    def total(self) -> float:
        """Bytes of all that is targeted."""
        return sum(layer.total for layer in self.layers)

    @property
    def whole(self) -> float:
        """The cost of leaving all of it out."""
        return sum(layer.whole for layer in self.layers)

    def at_share(self, share: float) -> Settled:
        """The lowest price, or prices, at which no more than this share is read."""
        if share >= 1:
            return Settled((-1.0,) * len(self.layers), 1.0, 0.0)
        if not self.even:
            return self._lowest(lambda found: found.share <= share)
        prices = tuple(
            _bisect(lambda price, layer=layer: layer.spent(price)[0] <= share * layer.total)  # type: ignore[misc]  # bound at once
            for layer in self.layers
        )
        return self._settled(prices)

    def at_cost(self, cost: float) -> Settled:
        """The highest price, or share saved, at which what is left out costs no more than this."""
        if not self.even:
            return self._highest(lambda found: found.cost <= cost)
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if self.at_share(middle).cost <= cost else (middle, high)
        return self.at_share(high)

    def _at(self, octave: float) -> Settled:
        return self._settled((2.0**octave,) * len(self.layers))

    def _settled(self, prices: tuple[float, ...]) -> Settled:
        found = [layer.spent(price) for layer, price in zip(self.layers, prices, strict=True)]
        return Settled(prices, sum(size for size, _ in found) / self.total, sum(cost for _, cost in found))

    def _lowest(self, enough: Callable[[Settled], bool]) -> Settled:
        low, high = BOTTOM, TOP
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if enough(self._at(middle)) else (middle, high)
        return self._at(high)

    def _highest(self, fits: Callable[[Settled], bool]) -> Settled:
        low, high = BOTTOM, TOP
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(self._at(middle)) else (low, middle)
        return self._at(low)


def _bisect(enough: Callable[[float], bool]) -> float:
    """The lowest price that is enough."""
    low, high = BOTTOM, TOP
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(2.0**middle) else (middle, high)
    return float(2.0**high)
