"""`--require`: bounds that a run's metrics must meet before anything is published."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rewright.passes.errors import BoundError, UsageError

_FORM = re.compile(r"\s*((?:\d+\.)?[A-Za-z_][\w.-]*)\s*(<=|>=|<|>)\s*([-+0-9.eE]+|inf)\s*")
_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def _parse(word: str) -> tuple[str, str, float]:
    match = _FORM.fullmatch(word)
    try:
        if match is None:
            raise ValueError
        return match[1], match[2], float(match[3])
    except ValueError:
        raise UsageError(
            f"`--require {word}` is not a bound",
            hint="write it as `perplexity_ratio<1.05`, quoted for the shell",
        ) from None


def check_words(words: Sequence[str]) -> None:
    """Refuse what is not a bound before any work is done. Raises UsageError."""
    for word in words:
        _parse(word)


def metrics(document: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number a run reports: a stage's as `name`, `pass.name` and `2.name`, and the evaluation's as `name`.

    A name that several stages report stands for the last of them.
    """
    for number, stage in enumerate(document["stages"], start=1):
        for name, value in _numbers(stage["metrics"]):
            yield name, value
            yield f"{stage['pass']}.{name}", value
            yield f"{number}.{name}", value
    yield from _numbers(document["evaluation"])


def _numbers(found: dict[str, Any] | None) -> Iterator[tuple[str, float]]:
    for name, value in (found or {}).items():
        if isinstance(value, int | float):
            yield name, float(value)


def hold(words: Sequence[str], document: dict[str, Any], missed: str) -> None:
    """Hold a run's document against its bounds; `missed` is the hint when one is not met.

    Raises BoundError, or UsageError for a metric nobody reports.
    """
    found = dict(metrics(document))
    for word in words:
        name, sign, limit = _parse(word)
        if name not in found:
            named = ", ".join(sorted(name for name in found if "." not in name))
            raise UsageError(
                f"`--require {word}`: no stage reports `{name}`",
                hint=f"metrics: {named}; `--eval-text FILE` adds perplexity_ratio and others",
            )
        value = found[name]
        if math.isnan(value) or not _HOLDS[sign](value, limit):
            raise BoundError(f"`{name}` is {value:.6g}, required {sign} {limit:g}", hint=missed)
