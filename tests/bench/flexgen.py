"""The placement search against what is known of it: `python -m tests.bench.flexgen --out docs/results`.

Parts can be run one by one with `--only`; each replaces its own figures in `flexgen.json`, from which the page is made.
Times are those of this process's CPU, one thread, and of the clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rewright.passes.flexgen_policy_search import policy
from rewright.passes.flexgen_policy_search.hills import Problem, pair
from rewright.passes.flexgen_policy_search.layered import search as layered
from rewright.passes.flexgen_policy_search.linear import released_search
from rewright.passes.flexgen_policy_search.model import read
from rewright.passes.flexgen_policy_search.place import place
from rewright.passes.flexgen_policy_search.policy import document, encode
from rewright.passes.flexgen_policy_search.presets import preset
from rewright.passes.flexgen_policy_search.published import Equations, seconds
from rewright.passes.flexgen_policy_search.roofline import Work
from rewright.passes.flexgen_policy_search.search import search
from rewright.passes.flexgen_policy_search.spec import FlexgenOptions
from rewright.passes.flexgen_policy_search.values import MachineName
from tests.bench.flexgen_models import LARGE
from tests.bench.flexgen_page import page
from tests.bench.harness import machine as facts
from tests.passes.flexing import OPT, brute, opt, settings, small, upgrades
from tests.passes.test_flexgen_published import GOLDEN, ROWS, equations, program, shares

# Of the golden cases those whose whole enumeration is short.
WHOLE = (2, 3, 4, 5, 8, 12, 13, 17, 19, 21)
# Upgrades that a machine gets, one after the other.
WALK = 10


def golden() -> dict[str, Any]:
    """The linear program at every golden pair, and the released script's whole way through the pairs of some."""
    rows = []
    for at, (model, prompt, sizes, gbs, nb, rate) in enumerate(GOLDEN):
        plan = program(model, prompt, sizes)
        found = plan.solve(gbs, nb)
        assert found is not None
        row: dict[str, Any] = {"model": model, "prompt": prompt, "sizes_gib": sizes, "golden": rate}
        row |= {"pair": [gbs, nb], "found": found.throughput, "error": abs(found.throughput / rate - 1)}
        if at in WHOLE:
            began = _clock()
            top, solved = released_search(plan)
            assert top is not None
            row |= {"released": top.throughput, "released_programs": solved, "released_s": _since(began)}
        began = _clock()
        seen = layered(plan)
        best = int(np.argmax(seen.throughput))
        row |= {"layers": float(seen.throughput[best]), "layers_s": _since(began)}
        row["layers_pair"] = [int(seen.gbs[best]), int(seen.nb[best])]
        rows.append(row)
    return {"rows": rows}


def rows() -> dict[str, Any]:
    """The paper's rows by the equations of the released script with the GPU's memory, the policy as published."""
    found = []
    for model, prompt, gbs, nb, percent, rate in ROWS:
        times = seconds(equations(model, prompt, gbs, nb, "t4-gcp-paper"), shares(percent))
        told = gbs * nb * 32 / float(sum(times)[0])
        found.append({"model": model, "prompt": prompt, "pair": [gbs, nb], "published": rate, "foretold": told})
    return {"rows": found}


def exhaustive() -> dict[str, Any]:
    """OPT-30B: every pair as a linear program of the released equations; relaxed pairs of the roofline."""
    plan = program("30b", 512, (16, 200, 1500))
    best, pair_, solved, floor = 0.0, (0, 0), 0, 7.13
    began = _clock()
    for gbs in range(1, 400):
        top = 0
        for nb in range(1, 700):
            made = Equations(
                plan.shape, plan.constants, plan.work, plan.law, np.array([gbs * 1.0]), np.array([nb * 1.0])
            )
            work = made.prefill()["comp"][1] + 31 * made.decode()["comp"][1]
            # what the products of matrices alone take bounds the pair
            if gbs * nb * 32 / float(work[0] * plan.shape.layers) < floor:
                continue
            found, solved = plan.solve(gbs, nb), solved + 1
            if found is None:
                break
            top = nb
            if found.throughput > best:
                best, pair_ = found.throughput, (gbs, nb)
        if not top and plan.solve(gbs, 1) is None:
            break
    told = {"released": {"best": best, "pair": pair_, "programs": solved, "seconds": _since(began)}}
    problem = Problem(read(opt("30b")), preset("t4-gcp-paper"), Work(512, 32), settings())
    mine = search(problem)
    assert mine is not None
    began, top_, count = _clock(), 0.0, 0
    for setting in problem.settings:
        for gbs in range(1, 33):
            for nb in range(1, 33):
                if 40 <= gbs * nb <= 160:
                    made_ = place(pair(problem, setting, gbs, nb), 0, problem.machine, relaxed=True)
                    count += 1
                    top_ = max(top_, 0.0 if made_ is None else made_.throughput)
    told["roofline"] = {"best": top_, "found": mine.best.throughput, "programs": count, "seconds": _since(began)}
    return told


def speed() -> dict[str, Any]:
    """The search of each model on two machines: seconds, the gap to what cut pieces would reach, equal bytes twice."""
    found = []
    for box in ("t4-gcp-paper", "h100-pcie5"):
        for name, layout in _models():
            model = read(layout)
            problem = Problem(model, preset(box), Work(512, 32), settings())
            times, best = [], None
            for _ in range(2):
                began = _clock()
                best = search(problem)
                times.append(_since(began))
            row: dict[str, Any] = {"model": name, "machine": box, "bytes": model.total_bytes, "experts": model.experts}
            row["seconds"] = min(times, key=lambda spent: spent["cpu"])
            if best is not None:
                row |= {"pair": [best.best.gbs, best.best.nb], "throughput": best.best.throughput}
                row["gap"] = 1 - best.best.throughput / best.bound
                asked = FlexgenOptions(machine=MachineName(box))
                began = _clock()
                one = encode(document(asked, layout))
                row["document_s"] = _since(began)["cpu"]
                policy._LAST.clear()
                row["same_bytes"] = one == encode(document(asked, layout))
            found.append(row)
    return {"rows": found}


def _models() -> Iterator[tuple[str, Any]]:
    for name in ("6.7b", "30b", "66b", "175b"):
        yield f"OPT-{name}", opt(name)
    for name, layout in LARGE.items():
        yield name, layout()


def machines(count: int) -> dict[str, Any]:
    """Random machines, each given more of something again and again: no step may lower the predicted throughput."""
    model, steps, worse, worst = read(opt("6.7b")), 0, [], 0.0
    for seed in range(-(-count // WALK)):
        before = 0.0
        for what, made in itertools.islice(upgrades(seed), WALK + 1):
            found = search(Problem(model, made, Work(512, 32), settings()))
            rate = found.best.throughput if found else 0.0
            steps += what is not None
            if rate < before * (1 - 1e-9):
                worse.append({"seed": seed, "more_of": what, "change": rate / before - 1})
                worst = min(worst, rate / before - 1)
            before = rate
    return {"steps": steps, "lower": len(worse), "worst": worst, "cases": worse}


def instances(count: int) -> dict[str, Any]:
    """Small instances, every placement of every piece tried one by one."""
    apart, placed = 0.0, 0
    for seed in range(count):
        problem = small(seed)
        best, found = brute(problem), search(problem)
        mine = found.best.throughput if found else 0.0
        placed += best > 0
        apart = max(apart, abs(mine - best) / max(best, 1e-30) if best or mine else 0.0)
    return {"instances": count, "feasible": placed, "largest_difference": apart}


def _clock() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def _since(began: tuple[float, float]) -> dict[str, float]:
    now = _clock()
    return {"cpu": round(now[0] - began[0], 3), "clock": round(now[1] - began[1], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=("golden", "rows", "exhaustive", "speed", "machines", "instances"))
    parser.add_argument("--machines", type=int, default=1000)
    parser.add_argument("--instances", type=int, default=50)
    said = parser.parse_args()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "golden": golden,
        "rows": rows,
        "exhaustive": exhaustive,
        "speed": speed,
        "machines": lambda: machines(said.machines),
        "instances": lambda: instances(said.instances),
    }
    assert set(OPT) >= {"6.7b", "30b"}
    for name, part in parts.items():
        if said.only in (None, name):
            made = part()
            file = said.out / "flexgen.json"
            results = json.loads(file.read_text()) if file.exists() else {}
            results |= {name: made, "machine": facts("cpu")}
            file.write_text(json.dumps(results, indent=1) + "\n")
            (said.out / "flexgen.md").write_text(page(results))
            print(name, "done")


if __name__ == "__main__":
    main()
