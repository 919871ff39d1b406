"""From counts to tensors: which pieces of a class go where, so that every layer streams about as much. Stdlib only."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rewright.passes.flexgen_policy_search.shape import Model, Piece

# Layers in an order in which any first few are spread over the whole depth.
_GOLDEN = 0.6180339887498949
# The farthest from the GPU first: what streams from the disk is spread before what streams from the host.
_ORDER = ("disk", "cpu", "compute")
WORDS = {"gpu": "gpu", "cpu": "cpu", "compute": "cpu-compute", "disk": "disk"}
Tiers = Mapping[tuple[str, int, str], int]


def pieces(model: Model, sizes: Sequence[int], counts: Tiers) -> list[tuple[Piece, str]]:
    """Every piece with its tier. Large classes come first, and each goes to the layers that stream least so far."""
    load: dict[int, float] = {}
    found: list[tuple[Piece, str]] = []
    for key in sorted(range(len(model.units)), key=lambda key: (-sizes[key], key)):
        unit = model.units[key]
        left: dict[int, list[int]] = {}
        for at, piece in enumerate(unit.pieces):
            left.setdefault(piece.layer, []).append(at)
        heap = [(load.get(layer, 0.0), _mixed(layer), layer) for layer in left]
        heapq.heapify(heap)
        taken: dict[int, str] = {}
        for tier in _ORDER:
            for _ in range(counts.get(("w", key, tier), 0)):
                held, order, layer = heapq.heappop(heap)
                taken[left[layer].pop(0)] = tier
                load[layer] = held + sizes[key]
                if left[layer]:
                    heapq.heappush(heap, (load[layer], order, layer))
        found += [(piece, taken.get(at, "gpu")) for at, piece in enumerate(unit.pieces)]
    return found


def _mixed(layer: int) -> float:
    return layer * _GOLDEN % 1.0


def tensors(model: Model, placed: Iterable[tuple[Piece, str]]) -> dict[str, Any]:
    """The tier of every tensor, a few of them the default; one that is cut has `[tier, first, past]` for its rows."""
    where: dict[str, Any] = dict.fromkeys(model.fixed, "gpu") | dict.fromkeys(model.idle, "none")
    for piece, tier in placed:
        for name in piece.tensors:
            if piece.rows is None:
                where[name] = WORDS[tier]
                continue
            cuts = where.setdefault(name, [])
            if cuts and cuts[-1][0] == WORDS[tier] and cuts[-1][2] == piece.rows[0]:
                cuts[-1][2] = piece.rows[1]
            else:
                cuts.append([WORDS[tier], *piece.rows])
    where = {name: tier[0][0] if isinstance(tier, list) and len(tier) == 1 else tier for name, tier in where.items()}
    words = [tier for tier in where.values() if isinstance(tier, str) and tier != "none"]
    default = max(("gpu", "cpu", "cpu-compute", "disk"), key=words.count)
    return {
        "default": default,
        "tensors": {name: tier for name, tier in sorted(where.items()) if tier != default},
    }


def caches(model: Model, classes: Sequence[tuple[Any, int]], counts: Tiers) -> list[str]:
    """The tier of each layer's cache, `none` where it keeps nothing; tiers alternate over the depth."""
    found = ["none"] * model.layers
    for key, (cache, _) in enumerate(classes):
        layers = sorted((at for at, one in enumerate(model.caches) if one == cache), key=_mixed)
        for tier in ("disk", "cpu", "gpu"):
            for _ in range(counts.get(("c", key, tier), 0)):
                found[layers.pop(0)] = tier
    return found
