"""Quality against bytes a token: attached predictors beside other ways to choose what is read, on one text.

`predicted` is what is attached, at every budget of its ladder. The others choose as many bytes: `oracle` knows what
every unit will be, `random` draws, `static` reads the units that cost most to miss in the mean, `teal` thresholds
sizes alike at every place (arXiv:2408.14690), for which neurons' first rows are read, `griffin` chooses a row's
neurons once by its first tokens (arXiv:2404.01365). What has to be settled on a text beforehand is settled on its
first documents, which are not scored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rewright.formats import dejavu
from rewright.formats.checkpoint import Checkpoint
from rewright.passes import calibration
from rewright.passes.context import Reporter, Silent
from rewright.passes.errors import InputError
from rewright.passes.inputs import Inputs
from rewright.passes.machine import compute_dtype, find_device, prepare, usable_cpus
from rewright.passes.models import sparse
from rewright.passes.models.sparse import Choice, Chooser, Flow
from rewright.passes.sparsity import Comparison, compare
from rewright.passes.values import Method
from rewright.passes.windows import windows

# Tokens of a row that are read densely, as a prompt is; GRIFFIN chooses by them.
PREFIX = 32
# Of the documents so many settle what other methods need.
SETTLING = 0.25
# Numbers of a place that thresholds are settled on.
SAMPLED = 1 << 18

Place = tuple[int, str]


@dataclass(slots=True)
class Seen:
    """What a place's numbers were on the settling documents: some of them, and of their costs a byte, and sums of
    these."""

    unit_bytes: int
    values: list[torch.Tensor] = field(default_factory=list)
    sampled: list[torch.Tensor] = field(default_factory=list)
    tokens: int = 0
    costs: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    @property
    def units(self) -> int:
        return len(self.costs)


@dataclass(slots=True)
class _Survey:
    """Hears of every place on the settling documents."""

    weights: dict[Place, torch.Tensor]
    places: dict[Place, Seen] = field(default_factory=dict)

    def note(self, choice: Choice, kept: torch.Tensor) -> None:
        place = choice.layer, choice.site
        seen = self.places.setdefault(place, Seen(choice.unit_bytes))
        costs = self.cost(choice)
        seen.costs = seen.costs + costs.sum(0).cpu()
        seen.tokens += len(costs)
        step = max(1, costs.numel() * 8 // SAMPLED)
        seen.sampled.append(costs.flatten()[::step].cpu())
        seen.values.append(choice.values.float().flatten()[::step].cpu())

    def cost(self, choice: Choice) -> torch.Tensor:
        """What each unit costs to leave out, a byte, [tokens, units]."""
        place = choice.layer, choice.site
        costs = choice.values.float().square()
        if place in self.weights:
            costs = costs * self.weights[place].to(costs.device)
        return costs / choice.unit_bytes


def against(
    path: Path,
    text: Path,
    methods: Sequence[Method],
    *,
    sequence_length: int = 256,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Every method at every budget that the attachment has: a row each, and the attached predictors layer by layer.

    Raises InputError for a checkpoint without predictors, or a text of too few documents.
    """
    from rewright.passes.loading import load, stored_dtype

    reporter = reporter or Silent()
    prepare(threads or usable_cpus())
    source, place = Checkpoint.open(path), find_device(device)
    found = dejavu.attached(source)
    if found is None:
        raise InputError(
            f"`{path}` has no predictors attached", hint="train some with `rewright dejavu-predictor-train`"
        )
    model, tokenizer = load(source, compute_dtype(dtype, place, stored_dtype(source)), place)
    flow = sparse.flow_of(model)
    assert flow is not None
    settling, scored, told = _rows(model, tokenizer, text, sequence_length)
    survey = _Survey(sparse.sensitivities(found))
    every: list[dict[str, Any]] = []
    flow.note = survey.note
    with torch.no_grad(), flow.scored(settling.shape[1]), reporter.progress("settling documents", len(settling)) as bar:
        for first in range(0, len(settling), 4):
            rows = settling[first : first + 4]
            model(input_ids=rows.to(model.device), use_cache=False)
            bar.advance(len(rows))
    flow.note = None
    counted = torch.ones_like(scored, dtype=torch.bool)

    def run(method: Method) -> Comparison:
        reporter.info(f"{method}: {len(every) + 1}")
        return compare(
            model, flow, scored, counted, reporter, prefix=min(PREFIX, scored.shape[1] // 2), weights=survey.weights
        )

    layers: list[dict[str, Any]] = []
    shares: list[float] = []
    for level, share in enumerate(found.config["levels"]):
        sparse.set_level(model, found, level)
        flow.choose = None
        seen = run("predicted")
        row = {"method": "predicted", "level": level, **seen.told(found.read_bytes)}
        every.append(row)
        shares.append(row["density"])
        if share == found.config["share"]:
            layers = [
                {"layer": layer, "site": site, **tally.told()}
                for (layer, site), tally in sorted(seen.meter.places.items())
            ]
    for method in methods:
        if method in ("predicted", "dense"):
            continue
        for level, share in enumerate(shares):
            flow.choose = _chooser(method, survey, flow, share, seed)
            seen = run(method)
            extra = _first_rows(flow, seen) if method == "teal" else 0
            every.append({"method": method, "level": level, **seen.told(extra)})
            flow.choose = None
    if "dense" in methods:
        every.append(
            {
                "method": "dense",
                "level": None,
                "kl": 0.0,
                "top1_agreement": 1.0,
                "perplexity_ratio": 1.0,
                "density": 1.0,
                "bytes_share": 1.0,
                "predictor_share": 0.0,
                "tokens": every[0]["tokens"],
            }
        )
    return {
        "methods": [row for row in every if row["method"] in (*methods, "predicted")],
        "places": layers,
        "prefix": min(PREFIX, scored.shape[1] // 2),
        "text": told,
    }


def _first_rows(flow: Flow, seen: Comparison) -> int:
    """Bytes of neurons' first rows that are read to know which neurons are small, where none is foretold."""
    first = 1 - flow.shape.width / flow.shape.row_weights(neuron=True)
    places = seen.meter.places.items()
    return round(
        sum(
            first * tally.unit_bytes * (tally.units - tally.read / tally.tokens)
            for (_, site), tally in places
            if site == "mlp"
        )
    )


def _rows(model: Any, tokenizer: Any, text: Path, length: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Whole windows of the settling documents and of the others, (rows, length)."""
    inputs = Inputs()
    texts = calibration.read_documents(text, inputs)
    cut = max(1, int(SETTLING * len(texts)))
    rows = model.get_input_embeddings().weight.shape[0]
    if len(texts) < 2:
        whole = list(windows(tokenizer, rows, texts, length, first_only=False))
        parts = [whole[: max(1, len(whole) // 4)], whole[max(1, len(whole) // 4) :]]
    else:
        parts = [list(windows(tokenizer, rows, part, length, first_only=False)) for part in (texts[:cut], texts[cut:])]
    kept = [torch.tensor([one.tokens for one in part if len(one.tokens) == length]) for part in parts]
    if not all(len(part) for part in kept):
        raise InputError(
            f"`{text}` has no whole window of {length} tokens to settle on and another to score",
            hint="give more text, or a smaller `--sequence-length`",
        )
    return (
        kept[0],
        kept[1],
        {"name": text.name, "digest": inputs.digest(text), "documents": len(texts), "windows": len(kept[1])},
    )


def _chooser(method: Method, survey: _Survey, flow: Flow, share: float, seed: int) -> Chooser:
    """How a method chooses a share of all targeted bytes."""
    makers: dict[Method, Callable[[], Chooser]] = {
        "random": lambda: _random(share, seed),
        "oracle": lambda: _oracle(survey, share),
        "static": lambda: _static(survey, share),
        "teal": lambda: _teal(survey, share),
        "griffin": lambda: _griffin(survey, flow, share),
    }
    return makers[method]()


def _random(share: float, seed: int) -> Chooser:
    draws = torch.Generator().manual_seed(seed)
    return lambda choice: (torch.rand(choice.values.shape, generator=draws) < share).to(choice.values.device)


def _at_share(costs: list[torch.Tensor], sizes: list[torch.Tensor], share: float) -> float:
    """The price at which this share of the bytes is kept, of units with these costs a byte and sizes."""
    cost, size = torch.cat(costs).double(), torch.cat(sizes).double()
    order = cost.argsort(descending=True)
    kept = size[order].cumsum(0)
    place = int(torch.searchsorted(kept, kept.new_tensor(share * float(kept[-1]))))
    return float(cost[order][min(place, len(cost) - 1)])


def _oracle(survey: _Survey, share: float) -> Chooser:
    costs = [torch.cat(seen.sampled) for seen in survey.places.values()]
    sizes = [
        torch.full((len(cost),), seen.unit_bytes * seen.units / len(cost))
        for cost, seen in zip(costs, survey.places.values(), strict=True)
    ]
    price = _at_share(costs, sizes, share)
    return lambda choice: survey.cost(choice) > price


def _static(survey: _Survey, share: float) -> Chooser:
    costs = {place: seen.costs / max(1, seen.tokens) for place, seen in survey.places.items()}
    sizes = [torch.full((seen.units,), float(seen.unit_bytes)) for seen in survey.places.values()]
    price = _at_share(list(costs.values()), sizes, share)
    kept = {place: cost > price for place, cost in costs.items()}
    return lambda choice: kept[choice.layer, choice.site].to(choice.values.device).expand(choice.values.shape)


def _teal(survey: _Survey, share: float) -> Chooser:
    limits = {
        place: float(torch.quantile(torch.cat(seen.values).abs()[:SAMPLED], 1 - share))
        for place, seen in survey.places.items()
    }
    return lambda choice: choice.values.abs() > limits[choice.layer, choice.site]


def _griffin(survey: _Survey, flow: Flow, share: float) -> Chooser:
    def choose(choice: Choice) -> torch.Tensor:
        values = choice.values.view(-1, flow.length, choice.values.shape[1]).float()
        prefix = flow.prefix or 1
        size = values[:, :prefix]
        size = (size / size.norm(dim=2, keepdim=True).clamp(min=1e-12)).norm(dim=1)
        kept = max(1, round(share * size.shape[1]))
        limit = size.topk(kept, dim=1).values[:, -1:]
        kept_rows: torch.Tensor = size >= limit
        return kept_rows[:, None].expand(values.shape).reshape(choice.values.shape)

    return choose
