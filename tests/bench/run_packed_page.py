"""What run_packed.py found, as Markdown."""

from __future__ import annotations

import math
from typing import Any


def page(results: dict[str, Any]) -> str:
    """Speed and memory of each way to run each model, ratios, command, machine."""
    lines = [
        "# What quantised models take to run",
        "",
        f"Speed, tokens a second: reading a prompt of {results['prompt_tokens']} tokens, writing"
        f" {results['new_tokens']} after it one at a time,",
        "scoring windows of 256. All ways in one process and in turn, one greedy loop, one thread, seconds that it had",
        f"a processor for, medians of {results['rounds']} rounds; ratios are medians of each round's. Memory: what a",
        "process that has made its imports, run a small model and opened the tokenizer takes at most beyond that, to",
        "generate and to score, keys, values and activations included. Models are rounded to the nearest code, which",
        "costs quality and no speed; the perplexity is there to tell ways apart.",
        "",
    ]
    for name, found in results["models"].items():
        lines += [f"## {name}", "", f"Groups of {found['group_size']}.", "", *_speeds(found["ways"]), ""]
        lines += [*_memory(found["ways"]), ""]
    facts = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    return "\n".join([*lines, f"Command: `{results['command']}`", "", f"Machine: {facts}", ""])


def _speeds(ways: dict[str, Any]) -> list[str]:
    dense = list(next(iter(ways.values()))["to"])
    heads = [f"{of}, to {name.split(',')[0]}" for of in ("decode", "prefill") for name in dense]
    lines = [f"| | decode | prefill | eval | {' | '.join(heads)} | perplexity |", "|---" * (5 + len(heads)) + "|"]
    for name, one in ways.items():
        rates = [f"{one[of]:.1f}" for of in ("decode", "prefill", "eval")]
        ratios = [f"{one['to'][other][of]:.2f}" for of in ("decode", "prefill") for other in dense]
        lines.append(f"| {name} | {' | '.join([*rates, *ratios])} | {math.exp(min(one['loss'], 700)):.2f} |")
    return lines


def _memory(ways: dict[str, Any]) -> list[str]:
    lines = ["| MB | file | weights held | generate | to the file | eval | to the file |", "|---" * 7 + "|"]
    for name, one in ways.items():
        cells = [f"{one[key] / 1e6:.1f}" for key in ("file_bytes", "weight_bytes")]
        for use in ("generate", "eval"):
            cells += [
                f"{one['memory'][use]['peak'] / 1e6:.1f}",
                f"{one['memory'][use]['peak'] / one['file_bytes']:.2f}",
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
