"""What peers.py found, as Markdown."""

from __future__ import annotations

from typing import Any

LABELS = {
    "0.14": "llm-compressor {llmcompressor}",
    "0.12": "llm-compressor {llmcompressor}",
    "sweep": "`compress --target own --mask sweep --refine 0 --sequential layer`",
    "default": "`compress`, defaults",
}
STEPS = {"0.14": "GPTQ alone", "0.12": "SparseGPT, then GPTQ with the zeros kept", "sweep": "", "default": ""}
BASE = "0.14"


def page(results: dict[str, Any]) -> str:
    """Times and scores of every model, what could not be done and why, versions, command, machine."""
    lines = [
        "# `compress` beside llm-compressor",
        "",
        "The same calibration tokens on both sides, symmetric W4, one thread, runs of all sides in turn. The wall",
        "time is from opening the model to the written checkpoint, in a process that has made its imports; memory is",
        "the process's peak, and in brackets what it held before it opened the model. Perplexity is of the 75",
        "held-out stories by the protocol of `rewright eval`; KL is from the dense model on the same tokens, in nats,",
        "and of random weights it alone says anything.",
        "",
    ]
    for name, found in results["models"].items():
        shape = f"{found['samples']} sequences of {found['length']} tokens, groups of {found['group_size']}"
        lines += [f"## {name}", "", f"Calibration on {shape}. Dense perplexity: {found['dense']:.3f}.", ""]
        lines += [*_times(found), "", *_scores(found), ""]
    facts = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    return "\n".join([*lines, *_versions(results), "", f"Command: `{results['command']}`", "", f"Machine: {facts}", ""])


def _label(side: str, found: dict[str, Any]) -> str:
    return LABELS[side].format(**found["times"][side]["versions"])


def _times(found: dict[str, Any]) -> list[str]:
    base = found["times"].get(BASE)
    lines = ["| | what | wall, s (range) | to GPTQ alone | peak memory, MiB | to GPTQ alone |", "|---" * 6 + "|"]
    for side, one in found["times"].items():
        what = ": ".join(part for part in (one["setting"], STEPS[side]) if part)
        wall = f"{one['wall_seconds']:.2f} ({one['wall_range'][0]:.2f} to {one['wall_range'][1]:.2f})"
        peak = f"{one['peak_bytes'] / 2**20:.0f} ({one['bytes_before'] / 2**20:.0f})"
        ratios = [f"{one[key] / base[key]:.2f}" if base else "-" for key in ("wall_seconds", "peak_bytes")]
        lines.append(f"| {_label(side, found)} | {what} | {wall} | {ratios[0]} | {peak} | {ratios[1]} |")
    return lines


def _scores(found: dict[str, Any]) -> list[str]:
    settings = list(dict.fromkeys(setting for row in found["scores"].values() for setting in row))
    lines = [f"| perplexity (KL) | {' | '.join(settings)} |", "|---" * (len(settings) + 1) + "|"]
    reasons: list[str] = []
    for side, row in found["scores"].items():
        cells = []
        for setting in settings:
            one = row[setting]
            value = f"{one['perplexity']:.3f} ({one['kl']:.4f})" if "perplexity" in one else ""
            if one["cannot"]:
                reasons.append(f"- {_label(side, found)}, {setting}: cannot: {one['cannot']}")
                value = f"cannot{f'; as it is {value}' if value else ''}"
            cells.append(value)
        lines.append(f"| {_label(side, found)} | {' | '.join(cells)} |")
    return [*lines, *(["", *reasons] if reasons else [])]


def _versions(results: dict[str, Any]) -> list[str]:
    """One line a side, from the first model."""
    found = next(iter(results["models"].values()))["times"]
    return [
        f"- {LABELS[side].format(**one['versions'])}: {', '.join(f'{k} {v}' for k, v in one['versions'].items())}"
        for side, one in found.items()
    ]
