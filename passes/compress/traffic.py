"""What the processes of a run send each other, counted from shapes. Standard library only.

Sums go once to whoever adds up a slice of them and once from there to all; a choice among all weights of a matrix goes
as counts. A few kilobytes of words a layer, which go through the launcher's store, are not counted.
"""

from __future__ import annotations

import math

from rewright.passes import chunks
from rewright.passes.chunks import merged, sent
from rewright.passes.compress.cost import ADMM_SELECTIONS
from rewright.passes.compress.shapes import FLOAT, Counting, Group
from rewright.passes.compress.units import units_of
from rewright.passes.world import World, counted_bytes

# Rounds of a choice, counts of a round, and their bytes; held equal to what the choice does by a test.
ROUNDS, BINS, COUNT = 3, 1 << 11, 8
# Columns whose zeros a sweep chooses together, where nothing else is asked for.
SWEEP_BLOCK = 32


def bytes_sent(count: Counting, processes: int) -> int:
    """Bytes of tensors that all processes together send in a run. Experts are taken to meet tokens of every chunk."""
    if processes == 1 or not count.options.splits:
        return 0
    world = World()
    world.size = processes
    sums = [_sums(count, world, part) for part in _parts(count)]
    total = 0
    for groups in count.layers:
        for group in groups:
            dense = count.options.fits_dense and not group.expert
            own, sampled, held_out = sums
            for part in (own, sampled if dense else [], held_out):
                sizes = [group.columns**2]
                if dense:
                    sizes.append(group.columns * (group.rows if group.writes else group.columns))
                if any(part):
                    total += sum(
                        sent(size, FLOAT, held, rank, processes) for size in sizes for rank, held in enumerate(part)
                    )
            total += processes * _choices(count, group, processes)
    return total


def _parts(count: Counting) -> list[range]:
    """The rows on which statistics are taken: the calibration's, those of them for errors, and those held out."""
    rows = count.samples + count.held_out
    sampled = min(count.samples, max(count.held_out, 1)) if count.both or count.held_out else 0
    return [range(count.samples), range(sampled), range(count.samples, rows)]


def _sums(count: Counting, world: World, part: range) -> list[int]:
    """How many partial sums over some rows each process has."""
    rows, sampled = count.samples + count.held_out, len(_parts(count)[1])
    dense_from = 0 if count.both else count.samples
    runs = chunks.chunks(chunks.batches(rows, count.length, (sampled, dense_from, count.samples)))
    costs = [sum((one.stop - one.start) * (1 + (one.start >= dense_from)) for one in run) for run in runs]
    met = [any(one.start in part for one in run) for run in runs]
    return [len(merged(number for number in share if met[number])) for share in world.shares(costs)]


def _choices(count: Counting, group: Group, processes: int) -> int:
    """Bytes that a process sends to choose zeros among all weights of matrices that are cut."""
    options = count.options
    cut = {member.name for unit in units_of(group.members) for member in unit.members if member.is_cut}
    matrices = sum(matrix.name in cut and matrix.sparsity > 0 for matrix in group.members)
    if not matrices or options.pattern.of is not None or options.mask == "keep":
        return 0
    if options.mask == "admm":
        times = ADMM_SELECTIONS * math.ceil(group.columns / (options.mask_block or group.columns))
    else:
        size, inner = options.mask_block or SWEEP_BLOCK, group.members[0].group or group.columns
        # whole groups where a group fits, parts of one where it does not
        step = max(1, size // inner) * inner
        blocks = [min(step, group.columns - start) for start in range(0, group.columns, step)]
        times = sum(math.ceil(block / (size if inner > size else step)) for block in blocks)
    once = ROUNDS * counted_bytes(matrices * BINS * COUNT, processes)
    return times * (once + counted_bytes(processes * matrices * COUNT, processes))
