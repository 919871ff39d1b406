"""The tables that `eval` and `bench` print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rewright.cli.figures import duration, figure, size


def eval_head(model: Path, other: Path | None) -> tuple[str, ...]:
    """The column heads: what is compared with stands first, as `before`."""
    return ("", str(model)) if other is None else ("", str(other), str(model))


def eval_rows(scores: Mapping[str, Any], model: Path, other: Path | None) -> Iterator[tuple[str, ...]]:
    """The rows of `eval`: stored size first, then scores, then what only a comparison has."""
    stored = [scores["checkpoints"][str(path)] for path in (other, model) if path is not None]
    both = [scores.get("other") or {}, scores] if other is not None else [scores]
    yield "size on disk", *(size(item["bytes"]) for item in stored)
    yield "bits a weight", *(figure(item["bits_per_weight"]) for item in stored)
    yield "in the layers", *(figure(item["layer_bits_per_weight"]) for item in stored)
    if any(item["seconds_to_make"] is not None for item in stored):
        yield "made in", *(_seconds(item["seconds_to_make"]) for item in stored)
    for key in ("perplexity", "bits_per_byte"):
        if key in scores:
            yield key.replace("_", " "), *(figure(item.get(key)) for item in both)
    for key in ("accuracy", "accuracy_normalised"):
        if key in (scores.get("choices") or {}):
            yield key.replace("_", " "), *(figure((item.get("choices") or {}).get(key)) for item in both)
    blank = ("",) if other is not None else ()
    for key, label in (("perplexity_ratio", "ratio"), ("kl", "KL (nats)"), ("top1_agreement", "top-1 agreement")):
        if scores.get(key) is not None:
            yield label, *blank, figure(scores[key])
    if "scored_tokens" in scores:
        yield "scored tokens", *blank, f"{scores['scored_tokens']}"
    yield "scored in", *blank, duration(scores["seconds"])


def _seconds(value: float | None) -> str:
    return "-" if value is None else duration(value)


def bench_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The rows of `bench`, in the order they come; counts of bytes are said as sizes."""
    for key, value in found.items():
        label = key.replace("_", " ")
        if isinstance(value, Mapping):
            for name, item in bench_rows(value):
                yield f"{label} {name}", item
        else:
            yield label, size(value) if "bytes" in key and isinstance(value, int) else figure(value)
