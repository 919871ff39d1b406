"""A report's picture: the error of every kind of matrix from layer to layer, and what a budget dealt out."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Inches at 100 dots each.
SIZE = (16.0, 10.0)
# Blue and vermilion of Okabe and Ito's palette: told apart in every kind of colour blindness, and in grey.
COLOURS = {"error_held_out": "#0072B2", "error_calibration": "#D55E00"}
STYLES = {"error_held_out": "-", "error_calibration": (0, (4, 2))}
LABELS = {"error_held_out": "held-out text", "error_calibration": "calibration text"}
BLOCK = "whole layer"
DEALT = {"sparsity": ("sparsity_asked", "zeros, %"), "bits": ("bits", "bits")}
# A table of more digits in a row than this has no figures in its cells.
MOST_DIGITS = 96
# A kind's name of more letters leaves no room for a word beside it.
LONG_NAME = 12

Series = dict[int, float]
Panel = dict[str, Series]


def draw(report: Mapping[str, Any]) -> bytes | None:
    """The picture as PNG, 1600 x 1000; None where no error was taken. Equal reports give equal bytes."""
    panels = panels_of(report)
    if not any(series for panel in panels.values() for series in panel.values()):
        return None
    # what it says of its font cache is nothing to who runs a pass
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        # whatever the user's own settings are
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.family": "DejaVu Sans", "font.size": 13, "axes.linewidth": 0.8})
        figure = Figure(figsize=SIZE, dpi=100, facecolor="white")
        FigureCanvasAgg(figure)
        _compose(figure, report, panels)
        file = io.BytesIO()
        # no version of the software: the bytes are those of the figures
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


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
        # on a logarithmic axis nothing stands for 0
        if row.get(key) is not None and row[key] > 0:
            values.setdefault(row["layer"], []).append(row[key])
    return {layer: sum(found) / len(found) for layer, found in sorted(values.items())}


def _dealt(report: Mapping[str, Any]) -> list[str]:
    """What a budget dealt out."""
    return [what for what in DEALT if any(what in row for row in report.get("budget", []))]


def _compose(figure: Figure, report: Mapping[str, Any], panels: Mapping[str, Panel]) -> None:
    dealt = _dealt(report)
    columns = min(4, math.ceil(len(panels) / 2)) if len(panels) > 3 else len(panels)
    rows = math.ceil(len(panels) / columns)
    share = 0.30 if dealt else 0.0
    top, bottom = 0.865, 0.075
    floor = bottom + share * (top - bottom) + (0.075 if dealt else 0)
    _title(figure, report)
    grid = figure.add_gridspec(
        rows, columns, left=0.065, right=0.985, top=top, bottom=floor, hspace=0.42 if dealt else 0.27, wspace=0.06
    )
    for place, kind in enumerate(panels):
        axes = figure.add_subplot(grid[divmod(place, columns)])
        _panel(axes, kind, panels, rows)
        below = place + columns >= len(panels)
        axes.tick_params(labelleft=place % columns == 0, labelbottom=True)
        if below:
            axes.set_xlabel("layer")
        if place % columns == 0:
            axes.set_ylabel("relative error")
    if dealt:
        # room for the kinds' names on the left
        left = 0.03 + 0.0072 * max(len(kind) for kind in panels)
        tables = figure.add_gridspec(
            1,
            len(dealt),
            left=left,
            right=0.985,
            top=bottom + share * (top - bottom) - 0.03,
            bottom=bottom,
            wspace=2.2 * left,
        )
        for place, what in enumerate(dealt):
            _table(figure, figure.add_subplot(tables[0, place]), report, what, len(dealt))


def _title(figure: Figure, report: Mapping[str, Any]) -> None:
    from matplotlib.lines import Line2D

    said = report["options"]
    share = {what: " on average" if what in _dealt(report) else "" for what in DEALT}
    words = [f"{said['bits']:g} bits{share['bits']}"] if said["bits"] < 16 else []
    if said["sparsity"]:
        words.append(f"{100 * said['sparsity']:g} % zeros{share['sparsity']}")
    if said["pattern"] != "unstructured":
        words.append(f"{said['pattern']} zeros")
    if said["bits"] < 16:
        words.append(f"groups of {said['group-size']}" if said["group-size"] != "channel" else "one scale a row")
    words.append(str(said["method"]))
    words += [f"{name} {said[name]}" for name in ("tune", "polish") if said[name]]
    figure.text(0.065, 0.955, "Error of each layer's matrices, relative to the dense model's output", fontsize=18)
    figure.text(0.065, 0.918, ", ".join(words), fontsize=13, color="0.35")
    lines = [Line2D([], [], color=COLOURS[key], linestyle=STYLES[key], linewidth=2) for key in COLOURS]
    others = Line2D([], [], color="0.82", linewidth=1)
    figure.legend(
        [*lines, others],
        [*LABELS.values(), "the other kinds, held-out text"],
        loc="lower right",
        bbox_to_anchor=(0.99, 0.905),
        ncols=3,
        frameon=False,
    )


def _limits(panels: Mapping[str, Panel]) -> tuple[float, float]:
    values = [value for panel in panels.values() for series in panel.values() for value in series.values()]
    return min(values) / 1.3, max(values) * 1.3


def _panel(axes: Axes, kind: str, panels: Mapping[str, Panel], rows: int) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    axes.set_yscale("log")
    for other, panel in panels.items():
        if other not in (kind, BLOCK):
            series = panel["error_held_out"] or panel["error_calibration"]
            axes.plot(list(series), list(series.values()), color="0.82", linewidth=1, zorder=1)
    depth = max((len(series) for panel in panels.values() for series in panel.values()), default=0)
    for key, series in panels[kind].items():
        axes.plot(
            list(series),
            list(series.values()),
            color=COLOURS[key],
            linestyle=STYLES[key],
            linewidth=2,
            marker="o" if depth <= 24 else None,
            markersize=5,
            zorder=3,
        )
    axes.set_title(kind, loc="left", fontsize=14 if len(kind) <= LONG_NAME else 12, fontweight="bold")
    _means(axes, panels[kind], [] if len(kind) > LONG_NAME else [("mean", "0.35")])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    low, high = _limits(panels)
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 4000 / rows**2 else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.yaxis.set_minor_locator(LogLocator(subs=()))
    axes.grid(axis="y", color="0.93", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _means(axes: Axes, panel: Panel, before: list[tuple[str, str]]) -> None:
    """Over a panel's right end: the means over the layers, in their lines' colours."""
    told = [(f"{sum(series.values()) / len(series):.2g}", COLOURS[key]) for key, series in panel.items() if series]
    for place, (text, colour) in enumerate(texts := [*before, *told], start=1):
        right = 1 - 0.19 * (len(texts) - place)
        axes.annotate(
            text, (right, 1), (0, 5), "axes fraction", "offset points", ha="right", color=colour, fontsize=11.5
        )


def _table(figure: Figure | SubFigure, axes: Axes, report: Mapping[str, Any], what: str, beside: int) -> None:
    """What a budget dealt to each kind of matrix in each layer."""
    from matplotlib.colors import BoundaryNorm
    from matplotlib.ticker import MaxNLocator

    key, label = DEALT[what]
    scale = 100 if what == "sparsity" else 1
    kinds = [row["kind"] for row in report["kinds"]]
    told = {row["layer"] for row in report["matrices"]}
    layers = range(min(told), max(told) + 1)
    cells = [[math.nan] * len(layers) for _ in kinds]
    for row in report["matrices"]:
        cells[kinds.index(row["kind"])][row["layer"] - layers.start] = scale * row[key]
    steps = sorted({value for values in cells for value in values if not math.isnan(value)})
    norm = None
    if what == "bits":
        norm = BoundaryNorm([steps[0] - 1, *((a + b) / 2 for a, b in pairwise(steps)), steps[-1] + 1], 256)
    box = (layers.start - 0.5, layers.stop - 0.5, len(kinds) - 0.5, -0.5)
    shown = axes.imshow(cells, aspect="auto", cmap="cividis", interpolation="nearest", norm=norm, extent=box)
    axes.set_title(f"dealt by the measured budget: {label}", loc="left", fontsize=14, fontweight="bold")
    axes.set_yticks(range(len(kinds)), kinds, fontsize=13 if len(kinds) < 9 else 10)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axes.set_xlabel("layer")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(shown, ax=axes, pad=0.01, fraction=0.03, spacing="uniform")
    if what == "bits":
        bar.set_ticks(steps, labels=[f"{step:g}" for step in steps])
        bar.minorticks_off()
    if len(layers) * beside * (1 if what == "bits" else 2) > MOST_DIGITS * (1.5 if beside > 1 else 1):
        return
    middle = steps[len(steps) // 2] if what == "bits" else (steps[0] + steps[-1]) / 2
    size = 8.5 if len(layers) * beside > 48 or len(kinds) > 8 else 10
    for y, values in enumerate(cells):
        for x, value in enumerate(values):
            if not math.isnan(value):
                ink = "w" if value < middle or len(steps) == 1 else "k"
                axes.text(layers[x], y, f"{value:.0f}", ha="center", va="center", fontsize=size, color=ink)
