"""An attached placement policy as `show` prints it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rewright.cli.console import table
from rewright.cli.figures import duration as whole_duration
from rewright.cli.figures import size
from rewright.formats.errors import FormatError

_TIERS = {"gpu": "GPU", "cpu": "host memory", "disk": "disk"}
_RESOURCES = {
    "h2d": "copies to the GPU",
    "d2h": "copies from the GPU",
    "disk_read": "reading the disk",
    "disk_write": "writing the disk",
    "gpu": "the GPU",
    "cpu": "the CPU",
    "dram": "host memory",
}


def policy_tables(policy: Mapping[str, Any]) -> Iterator[str]:
    """The policy in tables: what it is, what is on which tier, what each phase waits for, what more would give.

    Raises FormatError for a policy whose parts are not what this pass writes.
    """
    try:
        yield table(_facts(policy))
        yield ""
        yield table(_tiers(policy), head=("tier", "weights", "caches", "peak", "has"))
        yield ""
        yield table(_phases(policy["predicted"]), head=("phase", "takes", "waits for", "then for", "lead"))
        worth = sorted(policy["sensitivity"], key=lambda item: -item["d_throughput_pct_per_10pct"])
        gains = [(item["param"], f"+{item['d_throughput_pct_per_10pct']:.2g} %") for item in worth[:4]]
        gains = [gain for gain in gains if gain[1] != "+0 %"]
        if gains:
            yield ""
            yield table(gains, head=("10 % more of", "throughput"))
        yield ""
        yield table(_front(policy["pareto"]), head=("batches", "latency", "tokens/s", "host memory"))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise FormatError(f"the attached policy is damaged: {error!r}") from None


def duration(seconds: float) -> str:
    """A time span, short ones to three digits."""
    return whole_duration(seconds) if seconds >= 10 else f"{seconds:.3g} s"


def _facts(policy: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    work, plan, predicted = policy["workload"], policy["schedule"], policy["predicted"]
    machine, kept = policy["hardware"], policy["placement"]["kv"]
    yield "machine", f"{machine['name']}, {machine['source']}; cost model {policy['cost_model']}"
    yield "work", f"prompts of {work['prompt_len']} tokens, {work['gen_len']} more each; {work['objective']}"
    yield "schedule", f"{plan['kind']}, {plan['num_batches']} batches of {plan['gpu_batch']}"
    gap = f"{100 * predicted['mip_gap']:.2g} % below what cut pieces would reach"
    yield "foretold", f"{predicted['throughput']:.4g} tokens/s, {duration(predicted['latency_s'])} a block; {gap}"
    places = ", ".join(f"{kept[tier]} on {label}" for tier, label in _TIERS.items() if kept[tier])
    yield "caches", f"layers: {places or 'none'}; attention of decoding on {policy['compute']['decode_attention']}"
    yield "hidden states", _TIERS[policy["placement"]["hidden"]]
    weights, kv = policy["compression"]["weights"], policy["compression"]["kv"]
    said = [f"{name} at {part['bits']} bits" for name, part in (("weights", weights), ("caches", kv)) if part]
    yield "compression", ", ".join(said) or "none"
    for note in policy["notes"]:
        yield "note", note


def _tiers(policy: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    held, peak = policy["placement"]["bytes"], policy["predicted"]["peak_bytes"]
    for tier, label in _TIERS.items():
        whole = policy["hardware"]["tiers"][tier]["bytes"]
        yield label, size(held["weights"][tier]), size(held["kv"][tier]), size(peak[tier]), size(whole)


def _phases(predicted: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, told in predicted["phases"].items():
        seconds = predicted["decode_s" if name == "decode" else "prefill_s"]
        first, second = (_RESOURCES.get(told[key], str(told[key])) for key in ("resource", "second"))
        yield name, duration(seconds), first, second, f"{100 * told['margin']:.3g} %"


def _front(points: list[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for point in points:
        batches = f"{point['num_batches']} x {point['gpu_batch']}"
        yield batches, duration(point["latency_s"]), f"{point['throughput']:.4g}", size(point["cpu_bytes"])
