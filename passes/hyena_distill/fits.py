"""Bounds and fits of all filters, block by block: each is on record when it is done, and processes share them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.files import write_file
from rewright.passes.context import Context, Progress
from rewright.passes.hyena_distill.bound import bound
from rewright.passes.hyena_distill.closed_form import longest
from rewright.passes.hyena_distill.filters import read, real_logs
from rewright.passes.hyena_distill.fit import error, fit
from rewright.passes.hyena_distill.modal import Modal, joined
from rewright.passes.hyena_distill.plan import Group
from rewright.passes.hyena_distill.reduce import reduce
from rewright.passes.hyena_distill.rules import Rules
from rewright.passes.hyena_distill.settle import settle
from rewright.passes.hyena_distill.spec import ORDERS, HyenaDistillOptions
from rewright.passes.sharing import each

Rows = dict[str, list[Any]]

# The relative precision in which recurrences run.
NOISE = {"F32": 2.0**-24, "F64": 1e-15}


@dataclass(frozen=True, slots=True)
class Job:
    """A run of the pass: what to distil, and how; by group what errors are weighed with (None: nothing)."""

    context: Context
    options: HyenaDistillOptions
    source: Checkpoint
    groups: Sequence[Group]
    weights: Mapping[str, torch.Tensor] | None = None

    @property
    def folder(self) -> Path:
        """Where fits are kept until they are written."""
        return self.context.common / "fits"

    def filters(self, group: Group, block: range) -> torch.Tensor:
        """The filters of a block up to the horizon, float64 [filters, length]."""
        return read(self.source, group, block, self.options.horizon)

    def length(self, group: Group) -> int:
        return self.options.horizon or group.length

    def orders(self, group: Group) -> list[int]:
        """Those of ORDERS that the samples of a group can show, and the one that is asked for."""
        most = (self.length(group) - 1 - self.options.fir_head) // 2
        asked = self.options.order.states
        return sorted({*(order for order in ORDERS if order <= most), asked or ORDERS[0]})


def bounds(job: Job) -> dict[str, Rows]:
    """By group the norm of each filter after h_0 and the head, and what no recurrence of each order goes below."""

    def work(name: str, unit: tuple[Group, range], bar: Progress) -> Rows:
        group, block = unit
        filters, head = job.filters(group, block), 1 + job.options.fir_head
        found = bound(filters, job.orders(group), fir_head=job.options.fir_head, seed=job.context.seed)
        bar.advance(len(block))
        return {"norm": filters[:, head:].norm(dim=1).tolist(), "bound": found.tolist()}

    units = {f"bound {g.name} {b.start}": (g, b) for g in job.groups for b in g.blocks}
    return _by_group(units, each(job.context, "bound, filters", units, lambda unit: len(unit[1]), work))


def fits(job: Job, orders: Mapping[str, int]) -> dict[str, Rows]:
    """Fit every filter at the order of its group; by group the states and the error of each."""

    def work(name: str, unit: tuple[Group, range], bar: Progress) -> Rows:
        group, block = unit
        order, filters = orders[group.name], job.filters(group, block)
        # what is there several times is fitted once
        unique, places = torch.unique(filters, dim=0, return_inverse=True)
        first = torch.empty(len(unique), dtype=torch.int64).scatter_(0, places, torch.arange(block.start, block.stop))
        made = fitted(job, group, first, unique, order)
        write_file(file(job, group, block, order), save(_tensors(made.rows(places))))
        bar.advance(len(block))
        return {"states": made.states[places].tolist(), "error": error(unique, made)[places].tolist()}

    units = {f"fit {g.name} {b.start} order {orders[g.name]}": (g, b) for g in job.groups for b in g.blocks}
    job.folder.mkdir(parents=True, exist_ok=True)
    return _by_group(units, each(job.context, "fit, filters", units, lambda unit: len(unit[1]), work))


def fitted(job: Job, group: Group, places: torch.Tensor, filters: torch.Tensor, order: int) -> Modal:
    """The fit of some filters of a group, which are at `places`, as the options ask and as it will be stored."""
    options, wide = job.options, group.dtype == "F64"
    noise = NOISE[group.dtype]
    weighting = None if job.weights is None else job.weights[group.name][places]
    if group.kind == "real-modal":
        rules = Rules(longest(filters.shape[1]), noise=noise)
        made = reduce(filters, real_logs(job.source, group)[places], order, options.refine, rules)
    else:
        made = fit(
            filters,
            order,
            method=options.method,
            refine=options.refine,
            fir_head=options.fir_head,
            weighting=weighting,
            noise=noise,
            seed=job.context.seed,
        )
    return made if wide else settle(made, filters, Rules(noise=noise, weighting=weighting))


def file(job: Job, group: Group, block: range, order: int) -> Path:
    """Where the fit of a block is kept."""
    return job.folder / f"{job.groups.index(group)}-{block.start}-{order}.safetensors"


def kept(job: Job, group: Group, order: int) -> Modal:
    """The fits of a whole group."""
    # out of the file's own memory, which is not aligned as complex numbers are taken to be
    parts = [load_file(file(job, group, block, order)) for block in group.blocks]
    return joined([Modal(**{leaf: tensor.clone() for leaf, tensor in part.items()}) for part in parts])


def _tensors(made: Modal) -> dict[str, torch.Tensor]:
    return {field.name: getattr(made, field.name).contiguous() for field in dataclasses.fields(made)}


def _by_group(units: Mapping[str, tuple[Group, range]], made: Mapping[str, Rows]) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for name, (group, _) in units.items():
        rows = found.setdefault(group.name, {})
        for key, values in made[name].items():
            rows.setdefault(key, []).extend(values)
    return found


def together(values: Sequence[float]) -> float:
    """The norm of all from the norm of each."""
    return math.sqrt(math.fsum(value * value for value in values))
