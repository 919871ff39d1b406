"""The results of `tests.bench.filters` as Markdown."""

from __future__ import annotations

import math
from typing import Any

COLUMNS = (
    "bound",
    "modal truncation",
    "balanced truncation",
    "balanced truncation (slycot)",
    "AAA (scipy)",
    "start alone",
    "closed form",
    "gradient, published start",
    "gradient, best of 4",
)


def page(results: dict[str, Any]) -> str:
    """The whole page."""
    lines = [
        "# How near recurrences come to filters",
        "",
        "Relative l2 error over t >= 1 of recurrences of d real states, geometric means over fresh seeds. `bound` is",
        "what no recurrence of the order goes below; `start alone` has poles of the Hankel matrix and residues of",
        "least squares; `closed form` is the default of `hyena-distill`, `gradient` 3000 steps of Adam. A dash: not",
        "run; a number in brackets: of the first so many seeds.",
        "",
        f"| filters | length | d | {' | '.join(COLUMNS)} |",
        "|---" * (3 + len(COLUMNS)) + "|",
    ]
    found = gathered(results)
    for (row, length, order), errors in found.items():
        most = max(map(len, errors.values()))
        cells = [cell(errors.get(column, []), most) for column in COLUMNS]
        lines.append(f"| {row} | {length} | {order} | {' | '.join(cells)} |")
    lines += [
        "",
        "Filter by filter: the closed form's error over the bound, and over the better of the gradient fits.",
        "",
        "| filters | d | over the bound: mean | least | most | over gradient: most | CPU s: bound, closed form |",
        "|---" * 7 + "|",
    ]
    lines += [compared(key, errors, results) for key, errors in found.items() if "closed form" in errors]
    if results["speed"]:
        lines += ["", "Length 8192, order 16, bounds included, one thread:", ""]
        lines += ["| filters | how many | CPU s | wall s |", "|---|---|---|---|"]
        lines += [
            f"| HyenaDNA's init, {one['name']} | {one['filters']} | {one['cpu_seconds']:.1f} | {one['seconds']:.1f} |"
            for one in results["speed"]
        ]
    facts = ", ".join(f"{name} {value}" for name, value in results.get("machine", {}).items())
    lines += ["", "Command: `python -m tests.bench.filters --out docs/results`, and with `--speed 512`.", ""]
    return "\n".join([*lines, f"Machine: {facts}", ""])


def gathered(results: dict[str, Any]) -> dict[tuple[str, int, int], dict[str, list[float]]]:
    """Errors of each filter by (row, length, order) and column."""
    found: dict[tuple[str, int, int], dict[str, list[float]]] = {}
    for case in results["cases"]:
        errors = found.setdefault((case["row"], case["length"], case["order"]), {})
        if case["method"] == "gradient":
            errors["gradient, published start"] = case["published"]
            errors["gradient, best of 4"] = case["errors"]
        else:
            errors[case["method"]] = case["errors"]
    return found


def mean(values: list[float]) -> float:
    """Geometric; zero where one is."""
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0


def compared(key: tuple[str, int, int], errors: dict[str, list[float]], results: dict[str, Any]) -> str:
    row, _, order = key
    own = errors["closed form"]
    over = [a / b for a, b in zip(own, errors.get("bound", []), strict=False) if b > 0]
    beside = [a / b for a, b in zip(own, errors.get("gradient, best of 4", []), strict=False)]
    bounds = [f"{mean(over):.3f}", f"{min(over):.3f}", f"{max(over):.3f}"] if len(over) == len(own) else ["-"] * 3
    seconds = {
        case["method"]: case["cpu_seconds"] for case in results["cases"] if (case["row"], case["order"]) == (row, order)
    }
    spent = ", ".join(f"{seconds[method]:.3f}" for method in ("bound", "closed form") if method in seconds)
    return f"| {row} | {order} | {' | '.join(bounds)} | {f'{max(beside):.3f}' if beside else '-'} | {spent} |"


def cell(errors: list[float], most: int) -> str:
    if not errors:
        return "-"
    return number(mean(errors)) + (f" ({len(errors)})" if len(errors) < most else "")


def number(value: float) -> str:
    """Three digits."""
    if value == 0:
        return "0"
    return f"{value:.3f}" if value >= 1e-2 else f"{value:.1e}"
