"""A few filters of each group at every order, to show what order costs: errors, bounds, responses and poles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rewright.passes.context import Progress
from rewright.passes.hyena_distill.fit import error
from rewright.passes.hyena_distill.fits import Job, Rows, fitted
from rewright.passes.hyena_distill.modal import Modal
from rewright.passes.hyena_distill.plan import Group
from rewright.passes.sharing import each

# Filters of a group that are shown, and samples of a response that is drawn.
SHOWN, DRAWN = 3, 240


def examples(
    job: Job, bounds: Mapping[str, Rows], modals: Mapping[str, Modal], orders: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """By group: `orders`, errors and bounds of some filters at each, relative to their norms, and their responses."""

    def work(name: str, group: Group, bar: Progress) -> dict[str, Any]:
        own, known = orders[group.name], job.orders(group)
        tried = [order for order in known if order == own or (order <= 2 * own and order.bit_count() == 1)]
        places = _spread(group.filters)
        filters = torch.cat([job.filters(group, range(place, place + 1)) for place in places])
        head = 1 + job.options.fir_head
        columns = [known.index(order) for order in tried]
        least = torch.tensor([bounds[group.name]["bound"][place] for place in places])[:, columns]
        norm = filters[:, head:].norm(dim=1).clamp(min=1e-300)
        errors = torch.stack(
            [error(filters, fitted(job, group, torch.tensor(places), filters, order)) / norm for order in tried]
        )
        modal = modals[group.name].rows(torch.tensor(places))
        bar.advance()
        return {
            "filters": places,
            "orders": tried,
            "order": own,
            "error": errors.T.tolist(),
            "bound": (least / norm[:, None]).tolist(),
            "responses": _responses(filters, modal),
            "poles": modal.poles[modal.residues.abs().sum(2) > 0].tolist(),
        }

    units = {f"show {group.name}": group for group in job.groups}
    made = each(job.context, "show, groups", units, lambda group: 1, work)
    return {group.name: made[f"show {group.name}"] for group in job.groups}


def _spread(count: int) -> list[int]:
    """Places from the first to the last."""
    shown = min(SHOWN, count)
    return [round(place * (count - 1) / max(1, shown - 1)) for place in range(shown)]


def _responses(filters: torch.Tensor, modal: Modal) -> dict[str, Any]:
    """The first samples of the filters and of their recurrences: as many as hold nearly all of their energy."""
    energy = filters[:, 1:].square().sum(0).cumsum(0)
    enough = int((energy < 0.995 * energy[-1]).sum()) + 2
    length = min(filters.shape[1], max(DRAWN, enough))
    step = -(-length // DRAWN)
    return {
        "step": step,
        "filter": filters[:, :length:step].tolist(),
        "recurrence": modal.impulse(length)[:, ::step].tolist(),
    }
