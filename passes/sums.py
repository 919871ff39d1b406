"""Sums of tensors whose rounding depends on the terms' numbers alone, not on who added which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rewright.passes.chunks import PIECE, Span, merge, sent_of_piece

if TYPE_CHECKING:
    from rewright.passes.world import World


class OrderedSum:
    """A sum of numbered terms as a binary tree over their numbers: 2k and 2k + 1 are added first, then pairs of pairs.

    Terms are opened in ascending order, and added to while they are open. At most a few partial sums are held, one
    for each power of two.
    """

    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        self._make = make
        self._spans: list[Span] = []
        self._parts: list[torch.Tensor] = []
        self._open: int | None = None

    def term(self, number: int) -> torch.Tensor:
        """The term of this number, zeros when it is opened, to be added to."""
        if self._open != number:
            self.close()
            self._open = number
            self._parts.append(self._make())
        return self._parts[-1]

    def close(self) -> None:
        """Take the open term into the sum."""
        if self._open is None:
            return
        self._spans.append((self._open, 1))
        self._open = None
        _merge(self._spans, self._parts)

    @property
    def spans(self) -> list[Span]:
        """Which terms the partial sums are of."""
        self.close()
        return list(self._spans)

    @property
    def parts(self) -> list[torch.Tensor]:
        self.close()
        return self._parts

    def total(self) -> torch.Tensor:
        """The sum of all terms, zero where there are none; what was held is given up."""
        self.close()
        return _fold(self._parts) if self._parts else self._make()


def _merge(spans: list[Span], parts: list[torch.Tensor]) -> None:
    """Add the last partial sum to its sibling for as long as there is one."""
    while merge(spans):
        last = parts.pop()
        parts[-1].add_(last)


def _fold(parts: list[torch.Tensor]) -> torch.Tensor:
    """The sum of what has no sibling, from the last to the first."""
    while len(parts) > 1:
        parts[-2].add_(parts.pop())
    return parts.pop()


def exchange(world: World, group: Any, own: OrderedSum, spans: Sequence[Sequence[Span]]) -> torch.Tensor:
    """The sum over all processes: each adds up its slice of all partial sums, then all slices go to all."""
    parts = [part.reshape(-1) for part in own.parts]
    whole = parts[0].view_as(own.parts[0]) if parts else own.total()
    flat = whole.reshape(-1)
    for start in range(0, len(flat), PIECE):
        stop = min(start + PIECE, len(flat))
        _exchange_piece(world, group, [part[start:stop] for part in parts], spans, flat[start:stop])
    return whole


def _exchange_piece(
    world: World, group: Any, parts: Sequence[torch.Tensor], spans: Sequence[Sequence[Span]], out: torch.Tensor
) -> None:
    slab = -(-len(out) // world.size)
    cuts = [(min(rank * slab, len(out)), min((rank + 1) * slab, len(out))) for rank in range(world.size)]
    mine = cuts[world.rank][1] - cuts[world.rank][0]
    given = [part[first:last] for first, last in cuts for part in parts]
    sent = torch.cat(given) if given else out.new_empty(0)
    sizes = [len(parts) * (last - first) for first, last in cuts]
    taken = [len(theirs) * mine for theirs in spans]
    received = out.new_empty(sum(taken))
    group.all_to_all_single(received, sent, taken, sizes)
    pieces = torch.split(received, mine) if mine else ()
    found: list[tuple[Span, torch.Tensor]] = sorted(
        zip((span for theirs in spans for span in theirs), pieces, strict=False), key=lambda pair: pair[0]
    )
    held: list[torch.Tensor] = []
    met: list[Span] = []
    for span, piece in found:
        met.append(span)
        held.append(piece)
        _merge(met, held)
    own = out.new_zeros(slab)
    if held:
        own[:mine] = _fold(held)
    gathered = [torch.empty_like(own) for _ in range(world.size)]
    group.all_gather(gathered, own)
    out.copy_(torch.cat(gathered)[: len(out)])
    world.sent += sent_of_piece(len(out), out.element_size(), len(parts), world.rank, world.size)
