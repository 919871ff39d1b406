"""How near recurrences come to filters: `python -m tests.bench.filters --out docs/results`.

Filters of a dozen fresh seeds a row, made by the recipes of tests/passes/filter_suite.py, are fitted at several orders
by each method. Cases that the results already hold are not done again, so that a study may be done in parts:
`--methods` and `--rows` name them. `--speed N` fits N filters of length 8192 at order 16, bound included.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from rewright.passes.hyena_distill.bound import bound
from rewright.passes.hyena_distill.closed_form import longest
from rewright.passes.hyena_distill.fit import Method, error, fit
from rewright.passes.hyena_distill.gradient import FOUR, gradient
from tests.bench.filters_page import page
from tests.bench.filters_peers import aaa, slycot_balanced
from tests.bench.harness import machine
from tests.passes import filter_suite as suite

SEEDS = 12
# Filters that a dense balanced realisation of the library is asked for, and the most samples of them.
LIBRARY_SEEDS, LIBRARY_LENGTH = 2, 2048
# Relative errors of each filter, by what they are called.
Errors = dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    """Filters of one kind; `make` gives [1, length] for a seed."""

    name: str
    length: int
    orders: tuple[int, ...]
    make: Callable[[int], torch.Tensor]

    def filters(self, count: int) -> torch.Tensor:
        return torch.cat([self.make(seed) for seed in range(count)])


ROWS = (
    Row("HyenaDNA's init, frequency 10", 2048, (8, 16, 32), lambda seed: suite.hyena(1000 + seed, 2048)),
    Row("HyenaDNA's init, frequency 1", 8192, (8, 16), lambda seed: suite.hyena(2000 + seed, 8192, frequency=1.0)),
    Row("S4D-Lin, 64 states", 2048, (8, 16, 32), lambda seed: suite.s4d(3000 + seed, 2048)),
    Row("white noise, falling by e^20", 1024, (8, 16, 32), lambda seed: suite.noise(4000 + seed, 1024)),
)


def relative(filters: torch.Tensor, errors: torch.Tensor) -> list[float]:
    return (errors / filters[:, 1:].norm(dim=1)).tolist()


def _fit(method: Method, refine: int) -> Callable[[torch.Tensor, int], Errors]:
    def run(filters: torch.Tensor, order: int) -> Errors:
        made = fit(filters, order, method=method, refine=refine)
        return {"errors": relative(filters, error(filters, made))}

    return run


def _bound(filters: torch.Tensor, order: int) -> Errors:
    return {"errors": relative(filters, bound(filters, [order])[:, 0])}


def _gradients(filters: torch.Tensor, order: int) -> Errors:
    """The published start and the best of four, which it is one of."""
    unit = filters[:, 1:] / filters[:, 1:].norm(dim=1, keepdim=True)
    runs = [
        gradient(unit, order, limit=longest(filters.shape[1]), seed=place, begins=(begin,)).errors
        for place, begin in enumerate(FOUR)
    ]
    return {"published": runs[0].tolist(), "errors": torch.stack(runs).amin(dim=0).tolist()}


METHODS: dict[str, Callable[[torch.Tensor, int], Errors]] = {
    "bound": _bound,
    "modal truncation": _fit("modal", 0),
    "balanced truncation": _fit("balanced", 0),
    "start alone": _fit("closed-form", 0),
    "closed form": _fit("closed-form", 50),
    "AAA (scipy)": lambda filters, order: {"errors": [aaa(one, order) for one in filters]},
    "balanced truncation (slycot)": lambda filters, order: {
        "errors": [slycot_balanced(one, order) for one in filters[:LIBRARY_SEEDS]]
    },
    "gradient": _gradients,
}


def can(method: str, row: Row) -> bool:
    return "slycot" not in method or (find_spec("slycot") is not None and row.length <= LIBRARY_LENGTH)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"cases": [], "speed": []}


def save(path: Path, results: dict[str, Any], threads: int) -> None:
    results["machine"] = {**machine("cpu"), "threads": threads}
    path.write_text(json.dumps(results, indent=1) + "\n")


def study(store: Path, rows: Sequence[Row], methods: Sequence[str], seeds: int, threads: int) -> None:
    """Every case that is asked for and not there yet; each is on record when it is done."""
    for row in rows:
        for method in methods:
            for order in row.orders:
                key = {"row": row.name, "order": order, "method": method}
                known = load(store)["cases"]
                if not can(method, row) or any(all(one[part] == key[part] for part in key) for one in known):
                    continue
                filters = row.filters(seeds)
                started = time.process_time()
                found = METHODS[method](filters, order)
                spent = (time.process_time() - started) / len(found["errors"])
                results = load(store)
                results["cases"].append({**key, "length": row.length, **found, "cpu_seconds": round(spent, 4)})
                save(store, results, threads)
                print(row.name, order, method, f"{spent:.3f} s", file=sys.stderr, flush=True)


def speed(store: Path, count: int, threads: int) -> None:
    """CPU seconds for `count` filters of length 8192 at order 16, rough and smooth, bounds among them."""
    for name, frequency in (("frequency 10", 10.0), ("frequency 1", 1.0)):
        parts = [suite.hyena(5000 + net, 8192, frequency=frequency, count=128) for net in range(-(-count // 128))]
        filters = torch.cat(parts)[:count]
        started, wall = time.process_time(), time.perf_counter()
        bound(filters, [16])
        fit(filters, 16)
        taken = {"cpu_seconds": time.process_time() - started, "seconds": time.perf_counter() - wall}
        results = load(store)
        results["speed"] = [one for one in results["speed"] if one["name"] != name]
        results["speed"].append({"name": name, "filters": count, **taken})
        save(store, results, threads)
        print(name, taken, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for filters.json and filters.md")
    parser.add_argument("--rows", default=".*", help="those that this regular expression finds")
    parser.add_argument("--methods", default=".*", help="those that this regular expression matches whole")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--speed", type=int, default=0, metavar="N", help="instead, time N filters")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    store = given.out / "filters.json"
    if given.speed:
        speed(store, given.speed, given.threads)
    else:
        rows = [row for row in ROWS if re.search(given.rows, row.name)]
        methods = [method for method in METHODS if re.fullmatch(given.methods, method)]
        study(store, rows, methods, given.seeds, given.threads)
    (given.out / "filters.md").write_text(page(load(store)))


if __name__ == "__main__":
    main()
