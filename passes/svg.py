"""Pictures as SVG, by text alone: elements, words that fit their room, axes. Equal calls give equal text everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

FONTS = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,'Liberation Sans','DejaVu Sans',sans-serif"
INK = "#222"
FAINT = "#666"
# Ems that a letter takes at most on average, in any of FONTS.
LETTER, BOLD = 0.6, 0.66
# Letters and marks of XML's own, and what must not stand in a document or changes the direction of what follows it.
_SAFE: dict[int, str] = {
    **dict.fromkeys([*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000), 0xFEFF, 0xFFFE, 0xFFFF], "\ufffd"),
    **dict.fromkeys([*range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0x061C], "\ufffd"),
    **{ord(mark): entity for mark, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;"))},
}


def escape(words: str) -> str:
    """Words as they may stand in an element or between double quotes, whatever they are."""
    return words.translate(_SAFE)


def number(value: float) -> str:
    """A length, to a tenth."""
    told = f"{value:.1f}".removesuffix(".0")
    return "0" if told == "-0" else told


def tag(name: str, /, *inside: str, **attributes: str | float) -> str:
    """An element; `inside` is markup, attributes have `_` for `-` and may be anything."""
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value) if isinstance(value, str) else number(value)}"'
        for key, value in attributes.items()
    )
    return f"<{name}{told}>{''.join(inside)}</{name}>" if inside else f"<{name}{told}/>"


def title(words: str) -> str:
    """What a viewer tells of the element that this stands in."""
    return tag("title", escape(words))


def text(x: float, y: float, words: str, size: float = 12, **attributes: str | float) -> str:
    """Words on the baseline `y`, from `x` on, or as `text_anchor` says."""
    return tag("text", escape(words), x=x, y=y, font_size=size, **attributes)


def length(words: str, size: float, letter: float = LETTER) -> float:
    """About how long words are; letters beyond ASCII may be as wide as high."""
    return size * sum(letter if mark < "\x7f" else 1.0 for mark in words)


def fit(words: str, size: float, room: float, letter: float = LETTER) -> str:
    """Words that take no more than `room`; what is left out is before their last part, by which names differ."""
    if length(words, size, letter) <= room:
        return words
    for kept in range(min(len(words), int(room / size / letter)) - 1, 0, -1):
        cut = f"{words[: kept // 3]}…{words[len(words) - (kept - kept // 3) :]}"
        if length(cut, size, letter) <= room:
            return cut
    return "…"


def short(value: float) -> str:
    """A positive value to two digits: 0.012, 0.5, 34, 1.2e-5."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{value:.2g}" if -4 < int(exponent) < 2 else f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def log10(value: float) -> float:
    """The decimal logarithm to 1e-12, by arithmetic that IEEE 754 settles: C libraries differ in the last bit."""
    mantissa, exponent = math.frexp(value)
    if mantissa < 0.7071067811865476:
        mantissa, exponent = 2 * mantissa, exponent - 1
    ratio = (mantissa - 1) / (mantissa + 1)
    square, total = ratio * ratio, 0.0
    for odd in range(15, 0, -2):
        total = total * square + 1 / odd
    return exponent * 0.3010299956639812 + 2 * ratio * total * 0.4342944819032518


@dataclass(frozen=True, slots=True)
class Tick:
    """A place on a logarithmic axis: `mantissa` 1, 2 or 5 at a power of ten."""

    mantissa: int
    exponent: int

    @property
    def value(self) -> float:
        return float(f"{self.mantissa}e{self.exponent}")

    @property
    def label(self) -> str:
        value = f"{self.mantissa}e{self.exponent}"
        return f"{float(value):g}" if -5 < self.exponent < 5 else value


class LogAxis:
    """A logarithmic axis of positive values, between the ticks next to them on either side.

    Those that are shown, `ticks`, are powers of ten, and 2 and 5 times those where the values span less than two
    decades; over many decades as many as stand `between` apart.
    """

    def __init__(self, values: Iterable[float], low: float, high: float, between: float = 15) -> None:
        found = list(values)
        least, most = min(found), max(found)
        start, stop = math.floor(log10(least)) - 1, math.ceil(log10(most)) + 2
        every = [Tick(m, e) for e in range(start, stop) for m in (1, 2, 5)]
        first = max(place for place, tick in enumerate(every) if tick.value < least)
        last = min(place for place, tick in enumerate(every) if tick.value > most)
        self._first, end = log10(every[first].value), log10(every[last].value)
        self._low, self._decade = low, (high - low) / (end - self._first)
        fine = most < 100 * least
        step = max(1, math.ceil(between / abs(self._decade)))
        self.ticks = [
            tick for tick in every[first : last + 1] if fine or (tick.mantissa == 1 and tick.exponent % step == 0)
        ]

    def at(self, value: float) -> float:
        """Where a value is."""
        return self._low + self._decade * (log10(value) - self._first)


class LinearAxis:
    """An axis of values, from `low` to `high`, between the ticks next to them on either side: about `most` of them."""

    def __init__(self, values: Iterable[float], low: float, high: float, most: int = 5) -> None:
        found = list(values)
        least, greatest = min(found), max(found)
        span = max(greatest - least, abs(greatest) * 1e-6, 1e-12)
        steps = (Tick(mantissa, exponent) for exponent in range(-12, 20) for mantissa in (1, 2, 5))
        step = next(tick for tick in steps if span <= tick.value * (most - 1))
        first, last = math.floor(least / step.value), math.ceil(greatest / step.value)
        last += last == first
        digits = max(0, -step.exponent)
        self.ticks = [(place * step.value, f"{place * step.value:.{digits}f}") for place in range(first, last + 1)]
        self._first, self._low = first * step.value, low
        self._unit = (high - low) / ((last - first) * step.value)

    def at(self, value: float) -> float:
        """Where a value is."""
        return self._low + self._unit * (value - self._first)


def whole_ticks(first: int, last: int, most: int) -> list[int]:
    """Round whole numbers from `first` to `last`, about `most` of them at the most."""
    steps = (mantissa * 10**exponent for exponent in range(20) for mantissa in (1, 2, 5))
    step = next(step for step in steps if last - first < most * step)
    return list(range(-(-first // step) * step, last + 1, step))


def blend(light: str, dark: str, share: float) -> str:
    """A colour between two, `#rrggbb` as they are."""
    parts = ((int(light[at : at + 2], 16), int(dark[at : at + 2], 16)) for at in (1, 3, 5))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in parts)


def polyline(points: Sequence[tuple[float, float]], **attributes: str | float) -> str:
    """A line through points."""
    return tag("polyline", points=" ".join(f"{number(x)},{number(y)}" for x, y in points), fill="none", **attributes)


def document(width: float, height: float, name: str, description: str, parts: Iterable[str]) -> str:
    """A whole picture on white, with a title and a description for those who do not see it."""
    return (
        tag(
            "svg",
            "\n",
            tag("title", escape(name), id="title"),
            "\n",
            tag("desc", escape(description), id="desc"),
            "\n",
            tag("rect", width=width, height=height, fill="#fff"),
            "\n",
            "\n".join(parts),
            "\n",
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {number(width)} {number(height)}",
            width=width,
            height=height,
            font_family=FONTS,
            fill=INK,
            role="img",
            aria_labelledby="title desc",
        )
        + "\n"
    )
