"""How much an error in a number at a site matters: the Fisher information of what the model predicts.

With x what a site's matrices are fed, an error e in it changes the prediction by about KL = 1/2 E[(g . e)^2], where g
is the gradient to x of the log-likelihood of tokens that the model itself draws (Amari 1998, the Fisher metric). Its
diagonal, E[g_i^2], is kept: leaving number i out of a token costs 1/2 E[g_i^2] x_i^2 nats. With `energy` it is the
squared norm of the columns that x_i is multiplied with instead, as Deja Vu and WINA (arXiv:2505.19427) count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rewright.passes.chunks import rows_scored
from rewright.passes.context import Reporter
from rewright.passes.models.sites import SITES, Shape, Site
from rewright.passes.weights import Weights

Sensitivity = dict[tuple[int, Site], torch.Tensor]


def by_energy(shape: Shape, weights: Weights, layers: str) -> Sensitivity:
    """Twice the squared norms of the columns at each site, float32 [columns]; a matrix in memory at a time."""
    found: Sensitivity = {}
    for index in range(shape.layers):
        for site in SITES:
            total = torch.zeros(shape.columns(site))
            for name in shape.members(site):
                held = weights.read(f"{layers}.{index}.{name}.weight", torch.float32)
                total += 2 * held.square().sum(0)
            found[index, site] = total
    return found


def by_gradients(
    model: Any,
    shape: Shape,
    layers: nn.ModuleList,
    tokens: torch.Tensor,
    counted: torch.Tensor,
    seed: int,
    reporter: Reporter,
) -> Sensitivity:
    """E[g_i^2] at each site, float32 [columns], over the `counted` (rows, length) of `tokens`."""
    sums: dict[tuple[int, Site], torch.Tensor] = {
        (index, site): torch.zeros(shape.columns(site), dtype=torch.float64)
        for index in range(shape.layers)
        for site in SITES
    }
    draws = torch.Generator().manual_seed(seed)
    size = rows_scored(tokens.shape[1], model.get_input_embeddings().weight.shape[0])
    with reporter.progress("gradients", len(tokens)) as bar:
        for first in range(0, len(tokens), size):
            rows = slice(first, first + size)
            for place, gradient in _gradients(model, shape, layers, tokens[rows], draws).items():
                sums[place] += gradient[counted[rows]].double().square().sum(0).cpu()
            bar.advance(len(tokens[rows]))
    seen = max(1, int(counted.sum()))
    return {place: (total / seen).float() for place, total in sums.items()}


def _gradients(
    model: Any, shape: Shape, layers: nn.ModuleList, tokens: torch.Tensor, draws: torch.Generator
) -> Mapping[tuple[int, Site], torch.Tensor]:
    """Of the log-likelihood of drawn tokens, to what every site is fed: (rows, length, columns)."""
    met: dict[tuple[int, Site], torch.Tensor] = {}

    def watch(place: tuple[int, Site]) -> Any:
        def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            # matrices of one site are fed one tensor, whose gradient is of all of them
            if place not in met:
                args[0].retain_grad()
                met[place] = args[0]

        return note

    handles = [
        layer.get_submodule(shape.members(site)[0]).register_forward_pre_hook(watch((index, site)))
        for index, layer in enumerate(layers)
        for site in SITES
    ]
    try:
        with torch.enable_grad():
            given = model.get_input_embeddings()(tokens.to(model.device)).detach().requires_grad_()
            logits = model(inputs_embeds=given, use_cache=False).logits.float()
            # drawn on the CPU, so that every device draws alike
            chances = logits.detach().softmax(-1).flatten(0, 1).cpu()
            drawn = torch.multinomial(chances, 1, generator=draws)[:, 0].to(logits.device)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), drawn, reduction="sum")
            torch.autograd.backward(loss)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for place, tensor in met.items():
        assert tensor.grad is not None
        found[place] = tensor.grad.reshape(*tokens.shape, -1)
    return found
