"""Quality against bytes a token as a picture: a line for each way to choose what is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewright.passes import svg

WIDTH, HEIGHT, LEFT, RIGHT, HEAD, FOOT = 760, 460, 72, 150, 76, 56
TITLE = "Divergence from the dense model against bytes a token"
# Okabe and Ito's palette, told apart in every kind of colour blindness; dashes tell them apart in grey.
STYLES: dict[str, tuple[str, str]] = {
    "predicted": ("#0072B2", ""),
    "oracle": ("#000000", "2 3"),
    "random": ("#999999", "1 4"),
    "static": ("#E69F00", "6 3"),
    "teal": ("#D55E00", "8 3 2 3"),
    "griffin": ("#009E73", "4 2"),
}
# Divergences below this have no place on the axis.
LEAST = 1e-6
# Between two names at the right.
LINE = 16


def draw(report: Mapping[str, Any]) -> str:
    """The picture as SVG. Equal reports give equal text."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in report["methods"]:
        if row["method"] in STYLES:
            lines.setdefault(row["method"], []).append((row["bytes_share"], max(row["kl"], LEAST)))
    across = svg.LinearAxis([100 * x for line in lines.values() for x, _ in line] + [0.0, 100.0], LEFT, WIDTH - RIGHT)
    up = svg.LogAxis((y for line in lines.values() for _, y in line), HEIGHT - FOOT, HEAD)
    told = f"{report['text']['windows']} windows of {report['text']['name']}; after {report['prefix']} tokens of each"
    parts = [
        svg.text(16, 30, TITLE, 18, font_weight="600"),
        svg.text(16, 52, svg.fit(told, 12, WIDTH - 32), 12, fill=svg.FAINT),
        svg.text(LEFT - 56, HEAD - 8, "KL, nats", 11, fill=svg.FAINT),
        svg.text(
            (LEFT + WIDTH - RIGHT) / 2,
            HEIGHT - 16,
            "% of the targeted bytes that a token reads, predictors included",
            11,
            fill=svg.FAINT,
            text_anchor="middle",
        ),
    ]
    for tick in up.ticks:
        y = up.at(tick.value)
        parts.append(svg.tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, stroke="#e8e8e8"))
        parts.append(svg.text(LEFT - 6, y + 4, tick.label, 11, text_anchor="end", fill=svg.FAINT))
    for value, label in across.ticks:
        parts.append(svg.text(across.at(value), HEIGHT - FOOT + 18, label, 11, text_anchor="middle", fill=svg.FAINT))
    ends: list[tuple[float, str]] = []
    for method, line in lines.items():
        colour, dash = STYLES[method]
        points = [(across.at(100 * x), up.at(y)) for x, y in sorted(line)]
        dashed = {"stroke_dasharray": dash} if dash else {}
        width = 2.4 if method == "predicted" else 1.6
        parts.append(svg.polyline(points, stroke=colour, stroke_width=width, **dashed))
        parts += [svg.tag("circle", cx=x, cy=y, r=2.4, fill=colour) for x, y in points]
        ends.append((points[0][1], method))
    # names in the order of the lines' left ends, apart from each other
    at: float = HEAD - LINE
    for y, method in sorted(ends):
        at = max(at + LINE, y + 4)
        parts.append(svg.text(WIDTH - RIGHT + 12, at, method, 12, fill=STYLES[method][0], font_weight="600"))
    described = "; ".join(
        f"{method}: " + ", ".join(f"{100 * x:.0f} % {svg.short(y)}" for x, y in sorted(line))
        for method, line in lines.items()
    )
    return svg.document(WIDTH, HEIGHT, TITLE, described, parts)
