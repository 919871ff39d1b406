"""What a budget dealt to each kind of matrix in each layer: a table in colours, below a report's picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rewright.passes import svg

# Of a table: what is over its cells, the height of a row, the layers' numbers and their name.
OVER, ROW, UNDER = 28, 19, 56
# The widest cell, the longest name of a kind, the distance of two tables side by side.
CELL, NAME, GAP = 44, 230, 48
# Layers at most for two tables side by side.
BESIDE = 20
# From little to much; from INVERTED on, white figures are the more legible.
LITTLE, MUCH, INVERTED = "#dff0e8", "#00573f", 0.66


class Dealt(NamedTuple):
    """Where a matrix's row says what was dealt, what a table calls it, times what, and how figures are told."""

    key: str
    label: str
    scale: int
    figure: str


DEALT = {
    "sparsity": Dealt("sparsity_asked", "zeros, %", 100, ".0f"),
    "bits": Dealt("bits", "bits", 1, ".2g"),
}


def dealt(report: Mapping[str, Any]) -> list[str]:
    """What a budget dealt out."""
    return [what for what in DEALT if any(what in row for row in report.get("budget", []))]


def tables(report: Mapping[str, Any], left: float, top: float, room: float) -> tuple[list[str], float]:
    """The tables of what was dealt, within `room` across from `left`; and the height at which they end."""
    said = dealt(report)
    if not said:
        return [], top
    kinds = [row["kind"] for row in report["kinds"]]
    layers = [row["layer"] for row in report["matrices"]]
    beside = len(said) > 1 and max(layers) - min(layers) < BESIDE
    each = (room - GAP) / 2 if beside else room
    high = OVER + ROW * len(kinds) + UNDER
    found = []
    for place, what in enumerate(said):
        across, down = (place, 0) if beside else (0, place)
        values = cells(report, what)
        drawn = _Table(kinds, min(layers), max(layers), values, sorted(set(values.values())), what, each).drawn()
        where = f"translate({svg.number(left + across * (each + GAP))} {svg.number(top + down * high)})"
        found.append(svg.tag("g", *drawn, transform=where))
    return found, top + (1 if beside else len(said)) * high


def cells(report: Mapping[str, Any], what: str) -> dict[tuple[int, int], float]:
    """What was dealt, by the place of a kind and by layer; means over a layer's experts."""
    kinds = {row["kind"]: place for place, row in enumerate(report["kinds"])}
    values: dict[tuple[int, int], list[float]] = {}
    for row in report["matrices"]:
        values.setdefault((kinds[row["kind"]], row["layer"]), []).append(DEALT[what].scale * row[DEALT[what].key])
    return {place: sum(found) / len(found) for place, found in sorted(values.items())}


@dataclass(frozen=True, slots=True)
class _Table:
    kinds: Sequence[str]
    first: int
    last: int
    cells: Mapping[tuple[int, int], float]
    steps: Sequence[float]
    what: str
    room: float

    @property
    def _names(self) -> float:
        return min(NAME, max(svg.length(kind, 12) for kind in self.kinds)) + 8

    @property
    def _cell(self) -> float:
        """The width of a cell: whole, so that all are alike."""
        return min(CELL, max(1, (self.room - self._names) // (self.last - self.first + 1)))

    def drawn(self) -> Iterator[str]:
        name = f"dealt by the measured budget: {DEALT[self.what].label}"
        yield svg.text(0, 12, name, 14, font_weight="600")
        yield from self._scale(svg.length(name, 14, svg.BOLD) + 16)
        names, cell, layers = self._names, self._cell, self.last - self.first + 1
        for place, kind in enumerate(self.kinds):
            told = svg.fit(kind, 12, names - 8)
            yield svg.text(names - 8, OVER + ROW * place + 13.5, told, 12, text_anchor="end")
        yield from self._cells(names, cell)
        bottom = OVER + ROW * len(self.kinds)
        for layer in svg.whole_ticks(self.first, self.last, max(2, min(16, int(layers * cell / 30)))):
            x = names + cell * (layer - self.first + 0.5)
            yield svg.text(x, bottom + 15, str(layer), 11, text_anchor="middle", fill=svg.FAINT)
        yield svg.text(names + cell * layers / 2, bottom + 30, "layer", 11, text_anchor="middle", fill=svg.FAINT)

    def _share(self, value: float) -> float:
        low, high = self.steps[0], self.steps[-1]
        return (value - low) / (high - low) if high > low else 0.3

    def _colour(self, value: float) -> str:
        return svg.blend(LITTLE, MUCH, self._share(value))

    def _figure(self, value: float) -> str:
        return f"{value:{DEALT[self.what].figure}}"

    def _cells(self, left: float, wide: float) -> Iterator[str]:
        longest = max(len(self._figure(value)) for value in self.steps)
        size = next((size for size in (11, 9) if svg.length("0" * longest, size) <= wide - 2), None)
        boxes, told = [], []
        for (kind, layer), value in self.cells.items():
            x, y = left + wide * (layer - self.first), OVER + ROW * kind
            boxes.append(svg.tag("rect", x=x, y=y, width=wide, height=ROW, fill=self._colour(value)))
            ink = {"fill": "#fff"} if self._share(value) > INVERTED else {}
            told.append(svg.tag("text", self._figure(value), x=x + wide / 2, y=y + 13, **ink))
        # edges on whole dots, or light would show between cells
        yield svg.tag("g", *boxes, shape_rendering="crispEdges")
        if size:
            yield svg.tag("g", *told, font_size=size, text_anchor="middle")

    def _scale(self, x: float) -> Iterator[str]:
        """The colours of all values where they are few, else from the least to the most."""
        few = len(self.steps) <= 5
        low, high = self.steps[0], self.steps[-1]
        if not few:
            yield svg.text(x, 12, self._figure(low), 11, fill=svg.FAINT)
            x += svg.length(self._figure(low), 11) + 6
        for value in self.steps if few else [low + (high - low) * part / 5 for part in range(6)]:
            yield svg.tag("rect", x=x, y=2, width=14, height=12, fill=self._colour(value))
            x += 14
            if few:
                yield svg.text(x + 5, 12, self._figure(value), 11, fill=svg.FAINT)
                x += 5 + svg.length(self._figure(value), 11) + 12
        if not few:
            yield svg.text(x + 6, 12, self._figure(high), 11, fill=svg.FAINT)
