"""The policy as a document (`flexgen-policy/1`): equal options, headers and machine make equal bytes."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rewright.passes.flexgen_policy_search import answers, spread
from rewright.passes.flexgen_policy_search.exports import exports
from rewright.passes.flexgen_policy_search.hills import Problem
from rewright.passes.flexgen_policy_search.machine import Machine
from rewright.passes.flexgen_policy_search.model import read
from rewright.passes.flexgen_policy_search.place import Placed
from rewright.passes.flexgen_policy_search.roofline import CHUNK, Work
from rewright.passes.flexgen_policy_search.search import Found, leanest, search, shortage
from rewright.passes.flexgen_policy_search.settings import check_positions, machine_of, settings_of
from rewright.passes.flexgen_policy_search.shape import GROUP, Model
from rewright.passes.inputs import Inputs
from rewright.passes.spec import Layout

if TYPE_CHECKING:
    from rewright.passes.flexgen_policy_search.spec import FlexgenOptions

SCHEMA = "flexgen-policy/1"
# How weights cross: pages of a tensor, and layers that are under way.
PAGE, DEPTH, AHEAD = 8 << 20, 2, 2


def document(options: FlexgenOptions, layout: Layout, inputs: Inputs | None = None) -> dict[str, Any]:
    """The best policy for a checkpoint's headers. Raises InputError and ResourceError."""
    model, machine = read(layout), machine_of(options, inputs)
    check_positions(options, model)
    key = (options, model, machine)
    if key not in _LAST:
        # a run asks for what it attaches when it is estimated, and again when it is under way
        _LAST.clear()
        _LAST[key] = encode(_searched(options, layout, model, machine))
    found: dict[str, Any] = json.loads(_LAST[key])
    return found


_LAST: dict[tuple[FlexgenOptions, Model, Machine], bytes] = {}


def _searched(options: FlexgenOptions, layout: Layout, model: Model, machine: Machine) -> dict[str, Any]:
    work = Work(options.prompt_length, options.generate_length)
    problem = Problem(model, machine, work, settings_of(options, model), options.max_latency)
    if options.cost_model != "roofline":
        from rewright.passes.flexgen_policy_search.comparison import by_published

        return drawn_up(options, layout, problem, by_published(problem, options.cost_model), exact=False)
    found = leanest(problem) if options.objective == "min-ram" else search(problem)
    if found is None:
        raise shortage(problem)
    return drawn_up(options, layout, problem, found)


def drawn_up(
    options: FlexgenOptions, layout: Layout, problem: Problem, found: Found, *, exact: bool = True
) -> dict[str, Any]:
    """The document of a search's result; not `exact`: by the published equations, whose points stand as they are."""
    model, machine, best = problem.model, problem.machine, found.best
    made: dict[str, Any] = {
        "schema": SCHEMA,
        "checkpoint": {
            "path": ".",
            "headers_sha256": model.digest,
            "total_bytes": model.total_bytes,
            "arch": model.arch,
            "dtype": model.dtype,
            "sparsity": None if model.sparsity is None else asdict(model.sparsity),
        },
        "workload": {
            "prompt_len": problem.work.prompt,
            "gen_len": problem.work.generate,
            "lengths_histogram": None,
            "objective": options.objective,
            "max_latency_s": options.max_latency,
        },
        "cost_model": options.cost_model,
        "hardware": _hardware(machine),
        **_policy(model, best),
        "predicted": _predicted(best, found.bound),
        "sensitivity": answers.sensitivity(problem, best) if exact else [],
        "pareto": [_brief(one) for one in answers.pareto(problem, found)] if exact else answers.front(found),
        "alternatives": [{**_brief(one), **_setting(one)} for one in found.others],
        "notes": _notes(model, machine, best, options),
        "measured": None,
    }
    made["exports"] = exports(model, machine, layout, made)
    rounded: dict[str, Any] = _rounded(made)
    return rounded


def _hardware(machine: Machine) -> dict[str, Any]:
    rates = {}
    for name in ("h2d", "d2h", "disk_read", "disk_write", "dram", "hbm"):
        left = dict(machine.busy).get(name, 1.0)
        alone = getattr(machine, name) / left
        rates[name] = {"alpha_s": machine.copy_s, "bytes_per_s": alone, "concurrent_eff": left}
    return {
        "name": machine.name,
        "tiers": {
            "gpu": {"bytes": machine.gpu_bytes, "reserve": machine.gpu_reserve},
            "cpu": {"bytes": machine.cpu_bytes, "reserve": machine.cpu_reserve},
            "disk": {"bytes": machine.disk_bytes, "reserve": 0},
        },
        "rates": {
            **rates,
            "gemm": [
                {"m": rows, "flops": share * machine.gpu_flops} for rows, share in machine.gemm or ((CHUNK, 1.0),)
            ],
            "cpu_flops": machine.cpu_flops,
            "cpu_attn_bytes_per_s": machine.cpu_attn,
            **{f"{name}_per_s": getattr(machine, name) for name in machine.rates if name in machine.OPTIONAL},
            "launch_s": machine.launch_s,
        },
        "source": machine.source,
        "sources": dict(machine.sources),
        "holdout_mape": machine.holdout,
    }


def _policy(model: Model, best: Placed) -> dict[str, Any]:
    terms, setting = best.terms, best.terms.setting
    placed = spread.pieces(model, terms.sizes, best.counts)
    kept = spread.caches(model, terms.classes, best.counts)
    away = sum(kept.count(tier) for tier in ("cpu", "disk"))
    experts = {tier for piece, tier in placed if tier == "compute"}
    decode = "gpu" if setting.attention == "gpu" or not away else "split" if kept.count("gpu") else "cpu"
    computed = sum(tier == "compute" for _, tier in placed)
    every = sum(unit.count for unit in model.of("expert"))
    return {
        "schedule": {
            "kind": setting.schedule,
            "gpu_batch": best.gbs,
            "num_batches": best.nb,
            "prefill_chunk": CHUNK,
            "prefetch_depth": DEPTH,
            "page_bytes": PAGE,
            "attn_lookahead": AHEAD,
        },
        "compute": {
            "decode_attention": decode,
            "experts": "gpu" if not experts else "cpu" if computed == every else "mixed",
        },
        "compression": {
            "weights": None if setting.weight_bits is None else {"bits": setting.weight_bits, "group": GROUP},
            "kv": None if setting.kv_bits == 16 else {"bits": setting.kv_bits, "group": GROUP, "axis": "head_dim"},
        },
        "placement": {
            "weights": spread.tensors(model, placed),
            "kv": {
                "unit": "layer",
                **{tier: kept.count(tier) for tier in ("gpu", "cpu", "disk")},
                "per_layer": kept,
            },
            "hidden": setting.hidden,
            "bytes": {
                which: {tier: int(best.bytes_on(tier, letter)) for tier in ("gpu", "cpu", "disk")}
                for which, letter in (("weights", "w"), ("kv", "c"))
            },
        },
    }


def _predicted(best: Placed, bound: float) -> dict[str, Any]:
    spent = best.spent
    prefill = spent.get("prefill", spent.get("round", {}))
    decode = spent.get("decode", {})
    first = max(prefill.values(), default=0.0) if decode else best.seconds
    pinned = best.bytes_on("cpu") + (best.bytes_on("cpu", "c") if best.terms.setting.attention == "gpu" else 0)
    return {
        "throughput": best.throughput,
        "latency_s": best.seconds,
        "prefill_s": first,
        "decode_s": best.seconds - first if decode else 0.0,
        "binding": answers.busiest(best),
        "phases": answers.binding(best),
        "resources_prefill_s": prefill,
        "resources_decode_s": decode,
        "peak_bytes": {**best.peak, "pinned": int(pinned)},
        "relaxed_bound": bound,
        "mip_gap": 1 - best.throughput / bound,
    }


def _brief(one: Placed) -> dict[str, Any]:
    return {
        "gpu_batch": one.gbs,
        "num_batches": one.nb,
        "latency_s": one.seconds,
        "throughput": one.throughput,
        "cpu_bytes": one.peak["cpu"],
    }


def _setting(one: Placed) -> dict[str, Any]:
    setting = one.terms.setting
    return {
        "weight_bits": setting.weight_bits,
        "kv_bits": setting.kv_bits,
        "attention": setting.attention,
        "hidden": setting.hidden,
        "schedule": setting.schedule,
    }


def _notes(model: Model, machine: Machine, best: Placed, options: FlexgenOptions) -> list[str]:
    told = list(model.notes)
    if options.cost_model != "roofline":
        told.append("the published equations leave out embedding, head and logits")
        if not model.gated:
            told.append("the published equations take every head's keys, and two matrices of a feed-forward part")
    if model.sparsity is not None:
        share, rows = 100 * model.sparsity.share, model.sparsity.rows
        told.append(
            f"a token reads {share:.3g} % of what predictors know, where a batch has at most {rows}; copies are whole"
        )
    if machine.source == "detected":
        told.append("the machine is what was found here, with rates that were not measured")
    if best.peak["cpu"] == 0 and best.peak["disk"] == 0:
        told.append("no offload is needed: weights, caches and hidden states fit on the GPU")
    written = sum(spent["disk_write"] for spent in best.spent.values()) * machine.disk_write
    if written:
        told.append(
            f"a block of {best.gbs * best.nb} sequences writes {int(written)} bytes to the disk, which wears it"
        )
    if options.schedule == "staggered" or best.terms.setting.schedule == "staggered":
        told.append("the staggered schedule's throughput is that of a stream of prompts without end")
    return told


def _rounded(value: Any) -> Any:
    """Floats to nine digits: what differs beyond is the order of sums."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def encode(found: dict[str, Any]) -> bytes:
    """The document's bytes."""
    return (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode()
