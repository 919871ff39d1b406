"""The certificate as a picture: for each group error and bound by order, impulse responses, and poles in the disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rewright.passes import svg

WIDTH, LEFT, HEAD, ROW, PLOT = 1080, 64, 84, 240, 170
# Widths of a row's three panels, and what is between them.
ORDERS, RESPONSES, GAP = 330, 380, 56
# Of many groups so many are drawn, from the first to the last.
MOST = 8
# Blue for what was reached, vermilion for what cannot be gone below (Okabe and Ito).
REACHED, LEAST, FAINT = "#0072B2", "#D55E00", "#bbb"
TITLE = "Recurrences in place of long filters"
# Errors below this have no place on an axis.
SMALLEST = 1e-16


def draw(report: Mapping[str, Any]) -> str:
    """The picture as SVG. Equal reports give equal text."""
    rows = report["groups"]
    shown = sorted({round(place * (len(rows) - 1) / max(1, MOST - 1)) for place in range(MOST)} & set(range(len(rows))))
    told = report["summary"]
    parts = [
        svg.text(16, 30, TITLE, 18, font_weight="600"),
        svg.text(
            16,
            52,
            f"{told['filters']} filters, {told['states_mean']:.3g} states each in the mean; relative error"
            f" {svg.short(told['error'] or SMALLEST)}, no recurrence of these orders below"
            f" {svg.short(told['bound'] or SMALLEST)}",
            12,
            fill=svg.FAINT,
        ),
    ]
    for place, number in enumerate(shown):
        row = rows[number]
        example = report["examples"][row["name"]]
        parts.append(svg.tag("g", *_row(row, example), transform=f"translate(0 {HEAD + place * ROW})"))
    described = "; ".join(
        f"{row['name']}: order {row['order']}, error {svg.short(row['error'] or SMALLEST)}, bound"
        f" {svg.short(row['bound'] or SMALLEST)}"
        for row in rows
    )
    return svg.document(WIDTH, HEAD + len(shown) * ROW, TITLE, described, parts)


def _row(row: Mapping[str, Any], example: Mapping[str, Any]) -> list[str]:
    ratio = row["error_over_bound"]
    told = "" if ratio is None else f", {ratio:.2f} times the bound"
    name = f"{row['name']}: order {row['order']}, error {svg.short(row['error'] or SMALLEST)}{told}"
    second, third = LEFT + ORDERS + GAP, LEFT + ORDERS + RESPONSES + 2 * GAP
    return [
        svg.text(16, 0, svg.fit(name, 13, WIDTH - 32, svg.BOLD), 13, font_weight="600"),
        *_orders(LEFT, example),
        *_responses(second, example["responses"]),
        *_disk(third, min(PLOT, WIDTH - third - 16), example["poles"]),
    ]


def _orders(left: float, example: Mapping[str, Any]) -> list[str]:
    """Error and bound of the shown filters by order."""
    orders = example["orders"]
    series = [(values, REACHED) for values in example["error"]] + [(values, LEAST) for values in example["bound"]]
    found = [max(value, SMALLEST) for values, _ in series for value in values]
    across, up = svg.LogAxis(map(float, orders), left, left + ORDERS), svg.LogAxis(found, 24 + PLOT, 24)
    parts = [
        svg.text(left, 18, "error", 11, fill=REACHED, font_weight="600"),
        svg.text(left + 40, 18, "bound", 11, fill=LEAST, font_weight="600"),
        svg.text(left + ORDERS, 18, "relative, by order", 11, fill=svg.FAINT, text_anchor="end"),
    ]
    for tick in up.ticks:
        y = up.at(tick.value)
        parts.append(svg.tag("line", x1=left, x2=left + ORDERS, y1=y, y2=y, stroke="#e8e8e8"))
        parts.append(svg.text(left - 6, y + 4, tick.label, 11, text_anchor="end", fill=svg.FAINT))
    for order in orders:
        x = across.at(float(order))
        parts.append(svg.text(x, 24 + PLOT + 16, str(order), 11, text_anchor="middle", fill=svg.FAINT))
    x = across.at(float(example["order"]))
    parts.append(svg.tag("line", x1=x, x2=x, y1=24, y2=24 + PLOT, stroke=FAINT, stroke_dasharray="3 3"))
    for values, colour in series:
        points = [(across.at(float(o)), up.at(max(v, SMALLEST))) for o, v in zip(orders, values, strict=True)]
        parts.append(svg.polyline(points, stroke=colour, stroke_width=1.5, stroke_opacity=0.8))
        parts += [svg.tag("circle", cx=x, cy=y, r=2, fill=colour) for x, y in points]
    return parts


def _responses(left: float, responses: Mapping[str, Any]) -> list[str]:
    """Filters in grey with their recurrences over them, one above the other."""
    pairs = list(zip(responses["filter"], responses["recurrence"], strict=True))
    parts = [
        svg.text(left, 18, "filter", 11, fill=svg.FAINT, font_weight="600"),
        svg.text(left + 40, 18, "recurrence", 11, fill=REACHED, font_weight="600"),
    ]
    room = PLOT / len(pairs)
    for place, (own, made) in enumerate(pairs):
        middle = 24 + room * (place + 0.5)
        most = max([1e-300, *map(abs, own), *map(abs, made)])
        for values, colour, width in ((own, FAINT, 3.0), (made, REACHED, 1.2)):
            points = [
                (left + RESPONSES * t / max(1, len(values) - 1), middle - 0.45 * room * value / most)
                for t, value in enumerate(values)
            ]
            parts.append(svg.polyline(points, stroke=colour, stroke_width=width, stroke_linejoin="round"))
    length = responses["step"] * (len(pairs[0][0]) - 1)
    parts.append(svg.text(left, 24 + PLOT + 16, "0", 11, fill=svg.FAINT))
    parts.append(svg.text(left + RESPONSES, 24 + PLOT + 16, f"sample {length}", 11, text_anchor="end", fill=svg.FAINT))
    return parts


def _disk(left: float, size: float, poles: Sequence[Sequence[float]]) -> list[str]:
    """Poles in the unit disk, each of a pair."""
    radius = size / 2
    x, y = left + radius, 24 + radius
    parts = [
        svg.text(left, 18, "poles", 11, fill=REACHED, font_weight="600"),
        svg.tag("circle", cx=x, cy=y, r=radius, fill="none", stroke=svg.FAINT),
        svg.tag("line", x1=x - radius, x2=x + radius, y1=y, y2=y, stroke="#e8e8e8"),
        svg.tag("line", x1=x, x2=x, y1=y - radius, y2=y + radius, stroke="#e8e8e8"),
    ]
    for real, imaginary in poles:
        for side in (1, -1) if imaginary else (1,):
            if math.hypot(real, imaginary) <= 1:
                at = {"cx": x + radius * real, "cy": y - side * radius * imaginary}
                parts.append(svg.tag("circle", r=2.2, fill=REACHED, fill_opacity=0.6, **at))
    return parts
