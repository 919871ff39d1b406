"""Modal truncation: the modes that add most stay, the others go."""

from __future__ import annotations

import torch

from rewright.passes.hyena_distill.bound import half
from rewright.passes.hyena_distill.hankel import Hankel, leading
from rewright.passes.hyena_distill.modal import Modal, by_states, from_states, joined
from rewright.passes.hyena_distill.polish import Polished
from rewright.passes.hyena_distill.residues import residues
from rewright.passes.hyena_distill.rules import Rules
from rewright.passes.hyena_distill.start import shift_poles

# Most states of a filter's full model, and the singular values, as a part of the largest, that make its rank.
_MOST, _RANK = 128, 1e-9


def truncate(modal: Modal, order: int) -> Modal:
    """At most `order` real states of each filter: the modes of largest |R| / sqrt(1 - |p|^2) that find room.

    Residues and poles of those that stay are not changed.
    """
    square = modal.poles.square().sum(dim=2)
    size = modal.residues.square().sum(dim=2).sqrt() / (1 - square).clamp_min(1e-300).sqrt()
    rank = size.argsort(dim=1, descending=True, stable=True)[..., None].expand(-1, -1, 2)
    poles, residue = modal.poles.gather(1, rank), modal.residues.gather(1, rank)
    needs = torch.where(poles[..., 1] != 0, 2, 1) * (residue != 0).any(dim=2)
    taken = torch.zeros_like(modal.states)
    kept = torch.zeros_like(needs, dtype=torch.bool)
    for place in range(needs.shape[1]):
        kept[:, place] = (needs[:, place] > 0) & (taken + needs[:, place] <= order)
        taken = taken + torch.where(kept[:, place], needs[:, place], 0)
    first = (~kept).to(torch.int8).argsort(dim=1, stable=True)[..., None].expand(-1, -1, 2)
    entries = int(kept.sum(dim=1).max()) if kept.numel() else 0
    poles = torch.where(kept[..., None], poles, 0.0).gather(1, first)[:, :entries]
    residue = torch.where(kept[..., None], residue, 0.0).gather(1, first)[:, :entries]
    return Modal(poles.contiguous(), residue.contiguous(), modal.h0, modal.fir, taken)


def solved(modal: Modal, filters: torch.Tensor, rules: Rules) -> Modal:
    """The same poles with residues of least error for `filters` [C, L]."""
    head = modal.fir.shape[1]
    groups = list(by_states(modal))
    none = (modal.states == 0).nonzero()[:, 0]
    parts, places = [modal.rows(none)], [none]
    for chosen, states in groups:
        own = filters[chosen]
        coefficients, _ = residues(states, own[:, 1 + head :], rules.rows(chosen))
        parts.append(from_states(states, coefficients, own, head))
        places.append(chosen)
    return joined(parts).rows(torch.cat(places).argsort())


def full_model(samples: torch.Tensor, rules: Rules, seed: int) -> Polished:
    """Recurrences of as many states as the Hankel matrices of `samples` [C, n] have rank, or of _MOST."""
    size = half(samples.shape[1])
    pairs = leading(Hankel(samples, size), min(_MOST, size), seed)
    values = pairs.values.abs()
    order = max(1, int((values > _RANK * values[:, :1]).sum(dim=1).max()))
    states = shift_poles(pairs, order, rules.limit)
    return Polished(states, *residues(states, samples, rules))
