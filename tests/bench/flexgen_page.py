"""The results of `tests.bench.flexgen` as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def page(results: dict[str, Any]) -> str:
    """The whole page, of the parts that were run."""
    parts = {
        "golden": _golden,
        "rows": _rows,
        "exhaustive": _exhaustive,
        "speed": _speed,
        "machines": _machines,
        "instances": _instances,
    }
    lines = [
        "# Placement search",
        "",
        "What [`flexgen-policy-search`](../passes/flexgen-policy-search.md) finds, beside what is known of it. Seconds",
        "are those of the process's CPU on one thread; the clock's are in the JSON file, as other work ran on the",
        "machine.",
        "",
    ]
    for name, part in parts.items():
        if name in results:
            lines += part(results[name])
    facts = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    lines += ["Command: `python -m tests.bench.flexgen --out docs/results`", "", f"Machine: {facts}", ""]
    return "\n".join(lines)


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)] + [""]


def _golden(part: dict[str, Any]) -> list[str]:
    rows = part["rows"]
    worst = max(row["error"] for row in rows)
    head = ("model", "prompt", "GPU/host/disk GiB", "golden", "difference", "script, s (programs)", "whole layers", "s")
    body = []
    for row in rows:
        way = f"{row['released_s']['cpu']:.1f} ({row['released_programs']})" if "released_s" in row else "-"
        sizes = "/".join(map(str, row["sizes_gib"]))
        layers = f"{row['layers']:.4f} at {row['layers_pair'][0]} x {row['layers_pair'][1]}"
        body.append((row["model"], row["prompt"], sizes, f"{row['golden']:.6f}", f"{row['error']:.1e}", way, layers,
                     f"{row['layers_s']['cpu']:.2f}"))  # fmt: skip
    return [
        "## The released search",
        "",
        f"{len(rows)} optima of the original script, tokens/s of OPT, 32 tokens generated, 80 % of each tier: the",
        f"linear program at the script's pair of batch sizes differs by {worst:.1e} at most, the golden value having",
        "six decimals. The script's way through the pairs is our re-implementation, with HiGHS. `whole layers` is the",
        "exact search under the same equations, whose placements can be carried out.",
        "",
        *_table(head, body),
    ]


def _rows(part: dict[str, Any]) -> list[str]:
    rows = part["rows"]
    errors = [row["foretold"] / row["published"] - 1 for row in rows]
    mean = sum(map(abs, errors)) / len(errors)
    near = sum(abs(error) <= 0.1 for error in errors)
    body = []
    for row, error in zip(rows, errors, strict=True):
        batches = f"{row['pair'][0]} x {row['pair'][1]}"
        figures = (row["published"], f"{row['foretold']:.3g}", f"{100 * error:+.1f} %")
        body.append((row["model"], row["prompt"], batches, *figures))
    return [
        "## Published rows",
        "",
        "Tokens/s on a T4 as published (arXiv:2303.06865), and by `t4-gcp-paper` under the released equations with the",
        "GPU's memory counted, policies as published:",
        f"mean error {100 * mean:.1f} %, {near} of {len(rows)} within 10 %.",
        "",
        *_table(("model", "prompt", "batches", "published", "foretold", "difference"), body),
    ]


def _exhaustive(part: dict[str, Any]) -> list[str]:
    one, two = part["released"], part["roofline"]
    return [
        "## Beside every pair",
        "",
        f"OPT-30B, prompt of 512, released equations: the best of {one['programs']} linear programs, one for each pair",
        f"that its products of matrices leave in question, is {one['best']:.4f} tokens/s at"
        f" {one['pair'][0]} x {one['pair'][1]} ({one['seconds']['cpu']:.0f} s).",
        "",
        f"Roofline, `t4-gcp-paper`: the best of {two['programs']} pairs of 40 to 160 sequences in four settings,",
        f"pieces cut, is {two['best']:.4f} tokens/s ({two['seconds']['cpu']:.0f} s); the search finds"
        f" {two['found']:.4f}, {100 * two['found'] / two['best']:.2f} % of it.",
        "",
    ]


def _speed(part: dict[str, Any]) -> list[str]:
    body = []
    for row in part["rows"]:
        best = ["nothing fits", "-", "-", "-", "-"]
        if "pair" in row:
            best = [f"{row['pair'][0]} x {row['pair'][1]}", f"{row['throughput']:.4g}", f"{100 * row['gap']:.2f} %"]
            best += [f"{row['document_s']:.1f}", "yes" if row["same_bytes"] else "no"]
        body.append((row["model"], f"{row['bytes'] / 1e9:.4g}", row["machine"], f"{row['seconds']['cpu']:.2f}", *best))
    head = ("model", "GB", "machine", "search, s", "batches", "tokens/s", "gap", "document, s", "same bytes twice")
    return [
        "## Seconds",
        "",
        "Prompts of 512 tokens, 32 more each, four settings (attention on GPU or CPU, hidden states on GPU or host),",
        "weights as stored and keys at 16 bits. `gap` is to what the pair would reach if pieces could be cut. The",
        "document has the answers beside the policy too. Pairs are found by hills and walks from them, not always by",
        "the highest: the gap does not say so.",
        "",
        *_table(head, body),
    ]


def _machines(part: dict[str, Any]) -> list[str]:
    return [
        "## More of anything",
        "",
        "OPT-6.7B on random machines, each given more of a random tier or rate ten times over: of"
        f" {part['steps']} steps {part['lower']} lowered the",
        f"predicted throughput by more than 1e-9, the worst by {100 * -part['worst']:.2g} %.",
        "",
    ]


def _instances(part: dict[str, Any]) -> list[str]:
    return [
        "## Every policy of small instances",
        "",
        f"{part['instances']} random instances of two or three layers, {part['feasible']} of which have a policy that",
        "fits: every placement of every piece, setting and pair of batch sizes, tried one by one, is no better than",
        f"what the search finds; largest difference {part['largest_difference']:.1e}.",
        "",
    ]
