"""How a sparse model compares with its dense self on a text: divergence, agreement, what was read, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rewright.passes.chunks import rows_scored
from rewright.passes.context import Reporter
from rewright.passes.models.sparse import Choice, Flow


@dataclass(slots=True)
class Tally:
    """Of one place, sums over tokens: units that are not zero, that are read, that are both; energy, and what is
    kept."""

    units: int
    unit_bytes: int
    tokens: int = 0
    on: float = 0.0
    read: float = 0.0
    hit: float = 0.0
    energy: float = 0.0
    kept: float = 0.0

    def told(self) -> dict[str, float | None]:
        """Shares of units on and read, and of those on and of energy what was read."""
        every = max(1, self.tokens * self.units)
        return {
            "natural_density": self.on / every,
            "density": self.read / every,
            "recall": self.hit / self.on if self.on else None,
            "precision": self.hit / self.read if self.read else None,
            "energy_recall": self.kept / self.energy if self.energy else None,
        }


@dataclass(slots=True)
class Meter:
    """Hears of every choice; `weights` [units] say how much a unit's square matters, 1 where there are none.

    `counted` (tokens) is True for those that count in the batch under way.
    """

    weights: Mapping[tuple[int, str], torch.Tensor]
    counted: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    places: dict[tuple[int, str], Tally] = field(default_factory=dict)

    def note(self, choice: Choice, kept: torch.Tensor) -> None:
        """Take in one place's choice for a batch."""
        place = choice.layer, choice.site
        values, read = choice.values[self.counted].float(), kept[self.counted]
        tally = self.places.setdefault(place, Tally(values.shape[1], choice.unit_bytes))
        on, energy = values != 0, values.square()
        if place in self.weights:
            energy = energy * self.weights[place].to(energy.device)
        tally.tokens += len(values)
        tally.on += float(on.sum())
        tally.read += float(read.sum())
        tally.hit += float((on & read).sum())
        tally.energy += float(energy.sum(dtype=torch.float64))
        tally.kept += float((energy * read).sum(dtype=torch.float64))

    @property
    def read_bytes(self) -> float:
        """Bytes of targeted rows that a token reads."""
        return sum(one.read / max(1, one.tokens) * one.unit_bytes for one in self.places.values())

    @property
    def all_bytes(self) -> float:
        """Bytes of all targeted rows."""
        return float(sum(one.units * one.unit_bytes for one in self.places.values()))


@dataclass(slots=True)
class Comparison:
    """Sums over the tokens that count: divergence, agreements, log-likelihoods of the text under both."""

    meter: Meter
    tokens: int = 0
    kl: float = 0.0
    agreed: int = 0
    dense_loss: float = 0.0
    sparse_loss: float = 0.0

    def told(self, predictor_bytes: int) -> dict[str, Any]:
        """Means a token: what a report says. Shares are of the bytes of all targeted rows."""
        count, whole = max(1, self.tokens), self.meter.all_bytes
        gap = (self.sparse_loss - self.dense_loss) / count
        return {
            "kl": self.kl / count,
            "top1_agreement": self.agreed / count,
            "perplexity_ratio": float(torch.tensor(gap, dtype=torch.float64).exp()),
            "density": self.meter.read_bytes / whole,
            "bytes_share": (self.meter.read_bytes + predictor_bytes) / whole,
            "predictor_share": predictor_bytes / whole,
            "tokens": self.tokens,
        }


def compare(
    model: Any,
    flow: Flow,
    tokens: torch.Tensor,
    counted: torch.Tensor,
    reporter: Reporter,
    *,
    prefix: int = 1,
    weights: Mapping[tuple[int, str], torch.Tensor] | None = None,
) -> Comparison:
    """Score `tokens` (rows, length) densely and as they would be decoded after `prefix` tokens of each row.

    Those that are not `counted`, and the prefix, are left out of all sums.
    """
    found = Comparison(Meter(weights or {}))
    flow.note = found.meter.note
    size = rows_scored(tokens.shape[1], model.get_input_embeddings().weight.shape[0])
    try:
        with torch.no_grad(), reporter.progress("held-out text", len(tokens)) as bar:
            for first in range(0, len(tokens), size):
                rows = tokens[first : first + size].to(model.device)
                kept = counted[first : first + size].clone()
                kept[:, :prefix] = False
                found.meter.counted = kept.flatten().to(model.device)
                _take(found, model, flow, rows, kept.to(model.device), prefix)
                bar.advance(len(rows))
    finally:
        flow.note = None
    return found


def _take(found: Comparison, model: Any, flow: Flow, rows: torch.Tensor, kept: torch.Tensor, prefix: int) -> None:
    dense = model(input_ids=rows, use_cache=False).logits.float().log_softmax(-1)
    with flow.scored(prefix):
        sparse = model(input_ids=rows, use_cache=False).logits.float().log_softmax(-1)
    found.tokens += int(kept.sum())
    apart = (dense.exp() * (dense - sparse)).sum(-1)
    found.kl += float(apart[kept].sum(dtype=torch.float64))
    found.agreed += int((dense.argmax(-1) == sparse.argmax(-1))[kept].sum())
    # the last token of a row has none after it to be scored on
    before, target = kept[:, :-1], rows[:, 1:, None]
    for name, held in (("dense_loss", dense), ("sparse_loss", sparse)):
        scored = held[:, :-1].gather(2, target)[..., 0][before]
        # of the rows' last tokens the mean of the others stands in
        share = int(kept.sum()) / max(1, int(before.sum()))
        setattr(found, name, getattr(found, name) - float(scored.sum(dtype=torch.float64)) * share)
