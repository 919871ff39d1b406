"""A report's picture: the error of every kind of matrix from layer to layer, and what a budget dealt out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewright.passes import svg
from rewright.passes.compress import table

WIDTH, LEFT, RIGHT, HEAD = 1280, 64, 24, 108
# Of a panel: what is over its plot, its plot, its layers' numbers and their name; between two across.
OVER, PLOT, UNDER, GAP = 36, 150, 34, 28
# Room for a mean over a panel, and for the word before it.
MEAN, WORD = 54, 38
# Blue and vermilion of Okabe and Ito's palette: told apart in every kind of colour blindness, and in grey.
COLOURS = {"error_held_out": "#0072B2", "error_calibration": "#D55E00"}
DASHES: dict[str, dict[str, str]] = {"error_held_out": {}, "error_calibration": {"stroke_dasharray": "5 3"}}
LABELS = {"error_held_out": "held-out text", "error_calibration": "calibration text"}
OTHERS = "#ccc"
BLOCK = "whole layer"
TITLE = "Error of each layer's matrices, relative to the dense model's output"
# Layers that have marks of their own.
MARKED = 24
# Errors beyond these have no place on an axis.
LEAST, MOST = 1e-300, 1e300

Series = dict[int, float]
Panel = dict[str, Series]


@dataclass(frozen=True, slots=True)
class Frame:
    """What all panels have in common: their width, their layers, and the axis of their errors."""

    width: float
    first: int
    last: int
    axis: svg.LogAxis

    def x(self, layer: int) -> float:
        if self.first == self.last:
            return self.width / 2
        return 8 + (self.width - 16) * (layer - self.first) / (self.last - self.first)

    def points(self, series: Series) -> list[tuple[float, float]]:
        return [(self.x(layer), self.axis.at(error)) for layer, error in series.items()]


def draw(report: Mapping[str, Any]) -> bytes | None:
    """The picture as SVG; None where no error was taken. Equal reports give equal bytes."""
    panels = panels_of(report)
    told = [series for panel in panels.values() for series in panel.values() if series]
    if not told:
        return None
    columns = min(4, math.ceil(len(panels) / 2)) if len(panels) > 3 else len(panels)
    frame = Frame(
        (WIDTH - LEFT - RIGHT - GAP * (columns - 1)) / columns,
        min(min(series) for series in told),
        max(max(series) for series in told),
        svg.LogAxis((error for series in told for error in series.values()), PLOT, 0),
    )
    floor = HEAD + math.ceil(len(panels) / columns) * (OVER + PLOT + UNDER)
    tables, height = table.tables(report, LEFT, floor + 28, WIDTH - LEFT - RIGHT)
    behind = svg.tag("defs", *_behind(frame, panels))
    means = "; ".join(f"{kind} {_told(panel)}" for kind, panel in panels.items())
    return svg.document(
        WIDTH,
        height if tables else floor + 12,
        TITLE,
        f"{', '.join(_facts(report))}. Means over layers {frame.first} to {frame.last}: {means}.",
        [*_head(report, panels), behind, *_panels(frame, panels, columns), *tables],
    ).encode()


def panels_of(report: Mapping[str, Any]) -> dict[str, Panel]:
    """By kind of matrix, and for the whole layer, the errors by layer; means over a layer's experts."""
    found: dict[str, Panel] = {}
    for kind in (row["kind"] for row in report["kinds"]):
        rows = [row for row in report["matrices"] if row["kind"] == kind]
        found[kind] = {key: _by_layer(rows, key) for key in COLOURS}
    if report.get("layers"):
        found[BLOCK] = {key: _by_layer(report["layers"], key) for key in COLOURS}
    return found


def _by_layer(rows: Sequence[Mapping[str, Any]], key: str) -> Series:
    values: dict[int, list[float]] = {}
    for row in rows:
        # on a logarithmic axis nothing stands for 0 or infinity
        if row.get(key) is not None and LEAST < row[key] < MOST:
            values.setdefault(row["layer"], []).append(row[key])
    return {layer: sum(found) / len(found) for layer, found in sorted(values.items())}


def _mean(series: Series) -> str:
    return svg.short(sum(series.values()) / len(series))


def _told(panel: Panel) -> str:
    told = [f"{_mean(series)} on {LABELS[key]}" for key, series in panel.items() if series]
    return ", ".join(told) or "not measured"


def _facts(report: Mapping[str, Any]) -> list[str]:
    """The options that matter most, in a few words each."""
    said = report["options"]
    share = {what: " on average" if what in table.dealt(report) else "" for what in ("bits", "sparsity")}
    words = [f"{said['bits']:g} bits{share['bits']}"] if said["bits"] < 16 else []
    if said["sparsity"]:
        words.append(f"{100 * said['sparsity']:g} % zeros{share['sparsity']}")
    if said["pattern"] != "unstructured":
        words.append(f"{said['pattern']} zeros")
    if said["bits"] < 16:
        words.append(f"groups of {said['group-size']}" if said["group-size"] != "channel" else "one scale a row")
    words.append(str(said["method"]))
    return words + [f"{name} {said[name]}" for name in ("tune", "polish") if said[name]]


def _head(report: Mapping[str, Any], panels: Mapping[str, Panel]) -> Iterator[str]:
    """Title, facts, and what the lines are."""
    yield svg.text(LEFT, 38, TITLE, 20, font_weight="600")
    yield svg.text(LEFT, 62, ", ".join(_facts(report)), 13, fill=svg.FAINT)
    keys = [key for key in COLOURS if any(panel[key] for panel in panels.values())]
    lines: list[tuple[str, dict[str, str | float]]] = [
        (LABELS[key], {"stroke": COLOURS[key], "stroke_width": 2, **DASHES[key]}) for key in keys
    ]
    if len(panels) > 1:
        of = f", {LABELS[keys[0]]}" if len(keys) > 1 else ""
        lines.append((f"the other kinds{of}", {"stroke": OTHERS, "stroke_width": 1.5}))
    x = float(LEFT)
    for label, style in lines:
        yield svg.tag("line", x1=x, y1=86, x2=x + 30, y2=86, **style)
        yield svg.text(x + 38, 90, label, 13)
        x += 38 + svg.length(label, 13) + 16


def _behind(frame: Frame, panels: Mapping[str, Panel]) -> Iterator[str]:
    """Each kind's line as it stands in the panels of the others."""
    for place, (kind, panel) in enumerate(panels.items()):
        points = frame.points(panel["error_held_out"] or panel["error_calibration"])
        if kind != BLOCK and points:
            if len(points) > 1:
                yield svg.polyline(points, id=f"kind-{place}", stroke=OTHERS)
            else:
                yield svg.tag("circle", id=f"kind-{place}", cx=points[0][0], cy=points[0][1], r=2, fill=OTHERS)


def _panels(frame: Frame, panels: Mapping[str, Panel], columns: int) -> Iterator[str]:
    behind = [place for place, (kind, panel) in enumerate(panels.items()) if kind != BLOCK and any(panel.values())]
    for place, (kind, panel) in enumerate(panels.items()):
        row, column = divmod(place, columns)
        yield svg.tag(
            "g",
            svg.title(f"{kind}: {_told(panel)}"),
            *_name(frame, kind, panel),
            *_axes(frame, labels=column == 0, below=place + columns >= len(panels)),
            *(svg.tag("use", href=f"#kind-{other}") for other in behind if other != place),
            *_lines(frame, panel),
            transform=f"translate({svg.number(LEFT + column * (frame.width + GAP))}"
            f" {HEAD + row * (OVER + PLOT + UNDER) + OVER})",
        )


def _name(frame: Frame, kind: str, panel: Panel) -> Iterator[str]:
    """Over a panel: its kind, and at the right end the means over the layers, in their lines' colours."""
    told = [(_mean(series), COLOURS[key]) for key, series in panel.items() if series]
    right = frame.width
    for mean, colour in reversed(told):
        yield svg.text(right, -12, mean, 12, text_anchor="end", fill=colour)
        right -= MEAN
    whole = svg.length(kind, 14, svg.BOLD) <= right - WORD
    if told and whole:
        yield svg.text(right, -12, "mean", 12, text_anchor="end", fill=svg.FAINT)
    size = 14 if whole else 12
    yield svg.text(0, -12, svg.fit(kind, size, right, svg.BOLD), size, font_weight="600")


def _axes(frame: Frame, *, labels: bool, below: bool) -> Iterator[str]:
    for tick in frame.axis.ticks:
        y = frame.axis.at(tick.value)
        yield svg.tag("line", x1=0, y1=y, x2=frame.width, y2=y, stroke="#e8e8e8")
        if labels:
            yield svg.text(-8, y + 4, tick.label, 11, text_anchor="end", fill=svg.FAINT)
    yield svg.tag("line", x1=0, y1=PLOT, x2=frame.width, y2=PLOT, stroke="#888")
    for layer in svg.whole_ticks(frame.first, frame.last, 6):
        x = frame.x(layer)
        yield svg.tag("line", x1=x, y1=PLOT, x2=x, y2=PLOT + 4, stroke="#888")
        yield svg.text(x, PLOT + 16, str(layer), 11, text_anchor="middle", fill=svg.FAINT)
    if below:
        yield svg.text(frame.width / 2, PLOT + 31, "layer", 11, text_anchor="middle", fill=svg.FAINT)


def _lines(frame: Frame, panel: Panel) -> Iterator[str]:
    for key, series in panel.items():
        points = frame.points(series)
        if len(points) > 1:
            yield svg.polyline(points, stroke=COLOURS[key], stroke_width=2, stroke_linejoin="round", **DASHES[key])
        if len(points) <= MARKED:
            yield from (svg.tag("circle", cx=x, cy=y, r=3, fill=COLOURS[key]) for x, y in points)
    if not any(panel.values()):
        yield svg.text(frame.width / 2, PLOT / 2, "not measured", 12, text_anchor="middle", fill=svg.FAINT)
