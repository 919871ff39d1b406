"""The report of a search, as JSON and as a picture: what each resource does, what is where, what latency costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rewright.formats.draft import Draft
from rewright.passes import svg

REPORT = "reports/flexgen-policy-search.json"
PICTURE = "reports/flexgen-policy-search.svg"
# Of the picture: its width and height, and where its three columns begin and how wide they are.
WIDTH, HEIGHT, TOP, FOOT = 1080, 320, 92, 48
COLUMNS, COLUMN = (16, 384, 760), 300
# Colour-blind safe (Okabe and Ito): phases, parts of memory, the policy that was chosen.
FIRST, SECOND, THIRD, CHOSEN = "#0072B2", "#56B4E9", "#CCCCCC", "#D55E00"
_LABELS = {
    "h2d": "host to GPU",
    "d2h": "GPU to host",
    "disk_read": "disk read",
    "disk_write": "disk write",
    "gpu": "GPU",
    "cpu": "CPU",
    "dram": "host memory",
}


def put(draft: Draft, policy: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    """Write report and picture into a draft."""
    kept = ("workload", "cost_model", "hardware", "schedule", "compute", "compression", "predicted")
    parts = {key: policy[key] for key in (*kept, "sensitivity", "pareto", "alternatives", "notes")}
    draft.put(REPORT, json.dumps({"summary": dict(metrics), **parts}, indent=1).encode() + b"\n")
    draft.put(PICTURE, draw(policy).encode())


def draw(policy: Mapping[str, Any]) -> str:
    """Busy seconds by resource, bytes by tier, throughput by latency. Equal policies give equal text."""
    predicted, schedule = policy["predicted"], policy["schedule"]
    said = (
        f"{schedule['num_batches']} batches of {schedule['gpu_batch']} on {policy['hardware']['name']}:"
        f" {predicted['throughput']:.4g} tokens/s, {predicted['latency_s']:.4g} s a block,"
        f" held up by {_LABELS.get(predicted['binding'], predicted['binding'])}"
    )
    parts = [
        svg.text(16, 28, "Placement policy", 16, font_weight="bold"),
        svg.text(16, 48, svg.fit(said, 12, WIDTH - 32), 12, fill=svg.FAINT),
        *_resources(COLUMNS[0], predicted),
        *_tiers(COLUMNS[1], policy),
        *_trade(COLUMNS[2] + 40, policy["pareto"], schedule),
    ]
    return svg.document(WIDTH, HEIGHT, "Placement policy", said, parts)


def _resources(left: float, predicted: Mapping[str, Any]) -> list[str]:
    """A bar for each resource: busy in prefill, then in decoding."""
    prefill, decode = predicted["resources_prefill_s"], predicted["resources_decode_s"]
    most = max([prefill.get(name, 0) + decode.get(name, 0) for name in _LABELS] + [1e-12])
    parts = [svg.text(left, TOP - 14, "busy, seconds a block", 12, font_weight="bold")]
    for row, (name, label) in enumerate(_LABELS.items()):
        y, x = TOP + 28 * row, left + 84
        parts.append(svg.text(x - 8, y + 14, label, 11, text_anchor="end"))
        for phase, spent, colour in (("prefill", prefill, FIRST), ("decode", decode, SECOND)):
            wide = (COLUMN - 140) * spent.get(name, 0.0) / most
            if wide > 0.05:
                words = svg.title(f"{label}, {phase}: {spent[name]:.4g} s")
                parts.append(svg.tag("rect", words, x=x, y=y, width=wide, height=18, fill=colour))
            x += wide
        total = prefill.get(name, 0) + decode.get(name, 0)
        parts.append(svg.text(x + 5, y + 14, svg.short(total) if total > 0 else "0", 11, fill=svg.FAINT))
    return parts + _key(left, (("prefill", FIRST), ("decode", SECOND)))


def _tiers(left: float, policy: Mapping[str, Any]) -> list[str]:
    """A bar for each tier: weights, caches and all else of what it has."""
    held, peak = policy["placement"]["bytes"], policy["predicted"]["peak_bytes"]
    parts = [svg.text(left, TOP - 14, "peak of each tier, share of its size", 12, font_weight="bold")]
    for row, (tier, label) in enumerate((("gpu", "GPU"), ("cpu", "host"), ("disk", "disk"))):
        y, x, size = TOP + 48 * row, left + 44, max(1, policy["hardware"]["tiers"][tier]["bytes"])
        room = COLUMN - 60
        parts.append(svg.text(x - 8, y + 18, label, 11, text_anchor="end"))
        parts.append(svg.tag("rect", x=x, y=y, width=room, height=26, fill="none", stroke="#bbb"))
        weights, caches = held["weights"][tier], held["kv"][tier]
        shown = (
            ("weights", weights, FIRST),
            ("caches", caches, SECOND),
            ("other", peak[tier] - weights - caches, THIRD),
        )
        for name, count, colour in shown:
            wide = room * max(0, count) / size
            if wide > 0.05:
                words = svg.title(f"{label}, {name}: {count} bytes")
                parts.append(svg.tag("rect", words, x=x, y=y, width=wide, height=26, fill=colour))
            x += wide
        share = f"{peak[tier] / 1e9:.4g} of {size / 1e9:.4g} GB"
        parts.append(svg.text(left + 44, y + 40, share, 11, fill=svg.FAINT))
    return parts + _key(left, (("weights", FIRST), ("caches", SECOND), ("other", THIRD)))


def _key(left: float, colours: Sequence[tuple[str, str]]) -> list[str]:
    parts, x = [], left
    for name, colour in colours:
        parts.append(svg.tag("rect", x=x, y=HEIGHT - 22, width=10, height=10, fill=colour))
        parts.append(svg.text(x + 15, HEIGHT - 13, name, 11, fill=svg.FAINT))
        x += 26 + svg.length(name, 11)
    return parts


def _trade(left: float, pareto: Sequence[Mapping[str, Any]], schedule: Mapping[str, Any]) -> list[str]:
    """Throughput by latency, both on logarithmic axes."""
    parts = [svg.text(left - 40, TOP - 14, "tokens/s by latency, s", 12, font_weight="bold")]
    wide, base = COLUMN - 40, HEIGHT - FOOT
    across = svg.LogAxis([point["latency_s"] for point in pareto], left, left + wide, between=40)
    up = svg.LogAxis([point["throughput"] for point in pareto], base, TOP)
    for tick in up.ticks:
        y = up.at(tick.value)
        parts.append(svg.tag("line", x1=left, x2=left + wide, y1=y, y2=y, stroke="#ddd"))
        parts.append(svg.text(left - 6, y + 4, tick.label, 11, text_anchor="end", fill=svg.FAINT))
    parts += [
        svg.text(across.at(tick.value), base + 18, tick.label, 11, text_anchor="middle", fill=svg.FAINT)
        for tick in across.ticks
    ]
    places = [(across.at(point["latency_s"]), up.at(point["throughput"])) for point in pareto]
    parts.append(svg.polyline(places, stroke=FIRST, stroke_width=1.5))
    for (x, y), point in zip(places, pareto, strict=True):
        mine = all(point[key] == schedule[key] for key in ("gpu_batch", "num_batches"))
        batches, rate = f"{point['num_batches']} x {point['gpu_batch']}", f"{point['throughput']:.4g} tokens/s"
        words = f"{batches}: {rate}, {point['latency_s']:.4g} s"
        colour = CHOSEN if mine else FIRST
        parts.append(svg.tag("circle", svg.title(words), cx=x, cy=y, r=4 if mine else 3, fill=colour))
    return parts
