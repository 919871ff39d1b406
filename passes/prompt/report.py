"""The report of a `prompt` run, as JSON and as a picture of how it learned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewright.formats.draft import Draft
from rewright.formats.peft import Base
from rewright.passes import svg
from rewright.passes.context import Context
from rewright.passes.models.prompted import Front
from rewright.passes.prompt.spec import PromptOptions
from rewright.passes.spec import Metrics, to_plain

REPORT = "reports/prompt.json"
PICTURE = "reports/prompt.svg"
# Of the picture: its width and height, the room at the left of a plot, over and under it, and between the two.
WIDTH, HEIGHT, LEFT, HEAD, FOOT, GAP = 960, 320, 56, 72, 48, 24
LINE, AIM = "#0072B2", "#D55E00"


@dataclass(frozen=True, slots=True)
class Found:
    """What learning came to: a loss a step, `looks` at the validation text, and what the text was."""

    losses: Sequence[float]
    notes: Mapping[str, Any]
    text: Mapping[str, Any]

    @property
    def best(self) -> tuple[int, float]:
        """The step whose prompt was kept, and the validation text's perplexity with it."""
        step, perplexity = min(self.notes["looks"], key=lambda look: look[1])
        return int(step), float(perplexity)


def put(
    context: Context, draft: Draft, options: PromptOptions, prompt: Front, base: Base, found: Found | None
) -> Metrics:
    """Write the report into a draft; returns the pass's metrics."""
    metrics: Metrics = {"tokens": len(prompt)}
    report: dict[str, Any] = {
        "options": {flag: value for flag, value in to_plain(options, affects="result").items() if not _is_path(flag)},
        "base": {"width": base.width, "rows": base.rows, "embedding": base.checksum},
        "prompt": {
            "tokens": len(prompt),
            "depth": prompt.depth,
            "bytes": prompt.tensor.numel() * 4,
            "root_mean_square": float(prompt.tensor.square().mean().sqrt()),
        },
    }
    if found is not None:
        before, (step, after) = found.notes["before"], found.best
        tail = found.losses[-max(1, len(found.losses) // 20) :]
        metrics |= {
            "steps": len(found.losses),
            "best_step": step,
            "loss": sum(tail) / len(tail),
            "perplexity_before": before,
            "validation_perplexity": after,
            "validation_ratio": after / before,
        }
        report |= {"text": found.text, "losses": found.losses, "looks": found.notes["looks"]}
        if after >= before:
            context.reporter.warn(
                f"the prompt does not help: perplexity {after:.3f} on the validation text, {before:.3f} without it"
            )
        draft.put(PICTURE, draw(found).encode())
    draft.put(REPORT, json.dumps({"summary": metrics, **report}, indent=1).encode() + b"\n")
    return metrics


def _is_path(flag: str) -> bool:
    return flag in ("text", "validation-text", "teacher", "init")


def draw(found: Found) -> str:
    """Loss by step, and the validation text's perplexity with the one before learning. Equal runs give equal text."""
    steps, before = len(found.losses), found.notes["before"]
    looks = [(int(step), perplexity) for step, perplexity in found.notes["looks"]]
    width = (WIDTH - 2 * LEFT - GAP) / 2 - 12
    step, best = found.best
    parts = [
        svg.text(16, 28, "How the prompt learned", 16, font_weight="bold"),
        svg.text(
            16, 48, f"best at step {step}: perplexity {best:.4g}, {before:.4g} without a prompt", 12, fill=svg.FAINT
        ),
        *_panel(
            LEFT, width, "loss of a step, nats a token", [(i + 1, loss) for i, loss in enumerate(found.losses)], steps
        ),
        *_panel(2 * LEFT + GAP + width, width, "perplexity of the validation text", looks, steps, before),
    ]
    told = f"{steps} steps; perplexity of the validation text {before:.4g} before, {best:.4g} at step {step}"
    return svg.document(WIDTH, HEIGHT, "How the prompt learned", told, parts)


def _panel(
    left: float, width: float, name: str, points: Sequence[tuple[int, float]], steps: int, level: float | None = None
) -> list[str]:
    """A plot of values by step; `level` is a line across."""
    values = [value for _, value in points] + ([level] if level else [])
    if not values:
        return []
    axis = svg.LinearAxis(values, HEIGHT - FOOT, HEAD + 12)
    parts = [svg.text(left, HEAD, name, 12, font_weight="bold")]
    for value, label in axis.ticks:
        y = axis.at(value)
        parts.append(svg.tag("line", x1=left, x2=left + width, y1=y, y2=y, stroke="#ddd"))
        parts.append(svg.text(left - 6, y + 4, label, 11, text_anchor="end", fill=svg.FAINT))
    for step in svg.whole_ticks(0, max(1, steps), 6):
        x = left + width * step / max(1, steps)
        parts.append(svg.text(x, HEIGHT - FOOT + 18, str(step), 11, text_anchor="middle", fill=svg.FAINT))
    parts.append(svg.text(left + width / 2, HEIGHT - 12, "step", 11, text_anchor="middle", fill=svg.FAINT))
    if level:
        y = axis.at(level)
        line = svg.tag("line", svg.title("without a prompt"), x1=left, x2=left + width, y1=y, y2=y, stroke=AIM)
        parts += [line, svg.text(left + width, y - 5, "without a prompt", 11, text_anchor="end", fill=AIM)]
    place = [(left + width * step / max(1, steps), axis.at(value)) for step, value in points]
    parts.append(svg.polyline(place, stroke=LINE, stroke_width=1.5))
    return parts
