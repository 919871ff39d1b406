"""A choice among all weights of a matrix whose rows lie with several processes, who exchange counts and no weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from rewright.kernels.select import keep_largest
from rewright.passes.world import World

# The bits of a score that a round counts by, from the highest: 11, 11 and 10.
ROUNDS = ((21, 11), (10, 11), (0, 10))
BINS = 1 << 11

Keys = npt.NDArray[np.uint32]


def keep_largest_spread(
    parts: Sequence[Sequence[torch.Tensor]], prune: Sequence[int], world: World
) -> list[list[torch.Tensor]]:
    """All but the `prune` smallest scores of each matrix, as `keep_largest` has them of the whole.

    `parts` holds for each matrix this process's rows, float32, one tensor of whole rows after the other; the rows of
    a process follow those of the process before. Returns bool tensors of the same shapes.
    """
    if world.size == 1:
        return [_here(own, count) for own, count in zip(parts, prune, strict=True)]
    keys = [_keys(own) for own in parts]
    left = np.array(prune, dtype=np.int64)
    prefix = np.zeros(len(parts), dtype=np.uint32)
    for shift, bits in ROUNDS:
        counts = torch.zeros(len(parts), BINS, dtype=torch.int64)
        for row, own in enumerate(keys):
            # those that begin as the threshold does
            near = own if shift + bits == 32 else own[own >> np.uint32(shift + bits) == prefix[row]]
            places = (near >> np.uint32(shift)) & np.uint32((1 << bits) - 1)
            counts[row] = torch.from_numpy(np.bincount(places, minlength=BINS))
        below = world.count(counts).cumsum(1).numpy()
        for row in range(len(parts)):
            place = int(np.searchsorted(below[row], left[row])) if left[row] else 0
            left[row] -= below[row][place - 1] if place else 0
            prefix[row] = (prefix[row] << np.uint32(bits)) | np.uint32(place)
    tied = [int(np.count_nonzero(own == threshold)) for own, threshold in zip(keys, prefix, strict=True)]
    every = torch.zeros(world.size, len(parts), dtype=torch.int64)
    every[world.rank] = torch.tensor(tied)
    before = world.count(every)[: world.rank].sum(0).tolist()
    found = []
    for own, keep, threshold, due, earlier, count in zip(parts, keys, prefix, left, before, prune, strict=True):
        kept = keep >= threshold if count else np.ones(len(keep), dtype=bool)
        if count:
            # of those that equal the threshold, the first still have to go
            kept[np.flatnonzero(keep == threshold)[: max(0, int(due) - earlier)]] = False
        sizes = [part.numel() for part in own]
        pieces = torch.split(torch.from_numpy(kept), sizes)
        found.append([piece.view(part.shape).to(part.device) for piece, part in zip(pieces, own, strict=True)])
    return found


def _here(parts: Sequence[torch.Tensor], prune: int) -> list[torch.Tensor]:
    """With all rows in one process."""
    if not parts:
        return []
    keep = keep_largest(torch.cat(list(parts)), prune)
    return list(torch.split(keep, [len(part) for part in parts]))


def _keys(parts: Sequence[torch.Tensor]) -> Keys:
    """Whole numbers that order as the scores do, row after row."""
    # adding 0.0 makes -0.0 the 0.0 that it equals
    flat = [part.float().cpu().contiguous().view(-1).add(0.0).numpy().view(np.int32) for part in parts]
    joined = np.concatenate(flat) if flat else np.zeros(0, dtype=np.int32)
    ordered: Keys = np.where(joined < 0, joined ^ np.int32(0x7FFFFFFF), joined).view(np.uint32) ^ np.uint32(1 << 31)
    return ordered
