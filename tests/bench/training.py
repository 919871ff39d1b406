"""Training of the small models that passes are measured on: AdamW, warm-up and cosine, in float32 on a CPU."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

# Steps between two lines of the log.
EVERY = 50


def options(parser: argparse.ArgumentParser, *, rate: float, steps: int, minutes: float = 0.0) -> None:
    """What every training takes."""
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument(
        "--minutes", type=float, default=minutes, help="stop after so many of processor time per thread (0: never)"
    )
    parser.add_argument("--rate", type=float, default=rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)


def groups_of(model: torch.nn.Module, kept: str | None = None) -> list[dict[str, Any]]:
    """What decays towards zero, and what does not: vectors, and what has `kept` in its name."""
    still, decayed = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.dim() == 2 and (kept is None or kept not in name) else still).append(parameter)
    return [{"params": decayed, "weight_decay": 0.1}, {"params": still, "weight_decay": 0.0}]


def loss_of(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats of the tokens of rows, but the first of each."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: Any, rows: Iterable[torch.Tensor]) -> float:
    """Mean loss in nats a token over rows [1, tokens], which may have different lengths."""
    model.eval()
    losses, counts = [], []
    for row in rows:
        losses.append(float(loss_of(model, row)))
        counts.append(row.shape[1] - 1)
    model.train()
    return math.fsum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


def train(
    model: Any,
    draw: Callable[[torch.Generator], torch.Tensor],
    given: argparse.Namespace,
    *,
    kept: str | None = None,
    keep: Callable[[], None] = lambda: None,
    keep_every: int = 1000,
) -> dict[str, Any]:
    """What was measured while the model learned the rows [batch, tokens] that are drawn.

    `keep` is called every `keep_every` steps, so that a training that is cut off leaves a model.
    """
    optimiser = torch.optim.AdamW(groups_of(model.train(), kept), lr=given.rate, betas=(0.9, 0.98))
    draws = torch.Generator().manual_seed(given.seed)
    started, step, recent, tokens = time.process_time(), 0, 0.0, 0
    budget = 60 * given.minutes * given.threads if given.minutes else math.inf
    for step in range(1, given.steps + 1):
        used = time.process_time() - started
        # the schedule ends with whichever comes first
        share = min(1.0, max(step / given.steps, used / budget))
        optimiser.param_groups[0]["lr"] = optimiser.param_groups[1]["lr"] = (
            given.rate * min(1.0, step / 50) * (0.05 + 0.475 * (1 + math.cos(math.pi * share)))
        )
        rows = draw(draws)
        loss = loss_of(model, rows)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        tokens += rows[:, 1:].numel()
        recent = float(loss.detach()) if step == 1 else 0.95 * recent + 0.05 * float(loss.detach())
        if step % EVERY == 0:
            print(f"step {step}: loss {recent:.4f}, {used:.0f} s", file=sys.stderr, flush=True)
        if step % keep_every == 0:
            keep()
        if time.process_time() - started > budget:
            break
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": step,
        "seconds": round(time.process_time() - started, 1),
        "tokens": tokens,
        "training_loss": recent,
    }
