"""`--require`: bounds that a run's metrics must meet before anything is published."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rewright.passes.errors import BoundError, UsageError

if TYPE_CHECKING:
    from rewright.passes.recipe import Stage

# What an evaluation beside the source reports.
SCORES = ("perplexity", "perplexity_ratio", "bits_per_byte", "kl", "top1_agreement", "scored_tokens")
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


def check_words(words: Sequence[str], stages: Sequence[Stage] = (), *, scored: bool = True) -> None:
    """Refuse before any work what is not a bound, or is on a metric that no stage can report. Raises UsageError."""
    reported = [stage.spec.metrics for stage in stages]
    known = set(SCORES) if scored else set()
    for number, stage in enumerate(stages, start=1):
        for name in stage.spec.metrics or ():
            known |= {name, f"{stage.spec.name}.{name}", f"{number}.{name}"}
    for word in words:
        name, _, _ = _parse(word)
        if stages and None not in reported and name not in known:
            raise _unreported(word, name, known)


def _unreported(word: str, name: str, known: Iterable[str]) -> UsageError:
    return UsageError(
        f"`--require {word}`: no stage reports `{name}`",
        hint=f"metrics: {', '.join(sorted(n for n in known if '.' not in n))}; `--eval-text FILE` adds "
        "perplexity_ratio and others",
    )


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
            raise _unreported(word, name, found)
        value = found[name]
        if math.isnan(value) or not _HOLDS[sign](value, limit):
            raise BoundError(f"`{name}` is {value:.6g}, required {sign} {limit:g}", hint=missed)
