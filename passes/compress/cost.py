"""What the steps of a `compress` run take, counted from shapes. Standard library only.

Operations are those of matrix products. Bytes are those of the files, and of passes over memory that no product makes.
Peaks are what a step holds at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewright.passes.chunks import BATCH_TOKENS, CHUNKS
from rewright.passes.compress.shapes import FLOAT, Counting, Group
from rewright.passes.compress.units import units_of

# Held equal to what the steps themselves say, by a test: their modules need torch.
ADMM_ITERATIONS = 30
ADMM_SELECTIONS = 20
TUNE_TOKENS = 2048
POLISH_TOKENS = 1024
BUDGET_SEQUENCES = 8
ZEROS_TRIED = 5
BITS_TRIED = 4
# Bytes of memory traffic for each weight: of one column after the other in blocks of 32, of the search for a scale
# among 25, of an iteration of ADMM, of choosing the largest, of a step of Adam.
COLUMNS_BYTES = 180
CLIP_BYTES = 400
ADMM_BYTES = 24
SELECT_BYTES = 30
ADAM_BYTES = 60
# Passes over the logits for a divergence, and over what a matrix is given and gives.
LOGIT_PASSES = 8
SEEN_PASSES = 2


@dataclass(slots=True)
class Part:
    """A step: floating-point operations, bytes moved, and the most bytes that it holds at once."""

    step: str
    flops: float = 0
    bytes_moved: float = 0
    peak_bytes: float = 0

    def told(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "flops": round(self.flops),
            "bytes_moved": round(self.bytes_moved),
            "peak_bytes": round(self.peak_bytes),
        }


def parts(count: Counting) -> list[Part]:
    """The steps of a run in their order, each with what it takes; those that the options leave out are not there."""
    options = count.options
    texts = options.needs_text or bool(options.calibration_text)
    found = [Part("read and write", 0, count.file_bytes, count.base if texts else FLOAT * count.table)]
    if texts:
        if options.budget == "measured":
            found.append(_budget(count))
        found += [_forwards(count), _statistics(count)]
    if options.method != "gptq":
        found.append(_rounding(count, texts))
    else:
        found += [_target(count)] if options.fits_dense else []
        found += [_admm(count)] if options.mask == "keep" or (options.mask == "admm" and options.prunes) else []
        found += [_tune(count)] if options.tune else []
        found.append(_sweep(count))
        found += [_refine(count)] if options.refine else []
    if texts:
        found.append(_errors(count))
        found += [_polish(count)] if options.polish else []
    return found


def _groups(count: Counting) -> list[Group]:
    return [group for groups in count.layers for group in groups]


def _solving(count: Counting, stacks: float, units: float, squares: float) -> float:
    """Bytes at once of a solve that holds so many copies of all matrices of an input, of one unit, of the Hessian."""
    most = max(
        stacks * group.weights
        + units * max((unit.stop - unit.first) * group.columns for unit in units_of(group.members))
        + squares * group.columns**2
        for group in _groups(count)
    )
    return count.base + count.moments + FLOAT * most


def _forwards(count: Counting) -> Part:
    options = count.options
    ours = (count.samples + count.held_out) * count.length
    dense = ours if count.both else count.held_out * count.length
    again = 2 if options.tune else 1
    flops = 0.0
    seen = 0.0
    for groups in count.layers:
        one = count.work(groups) + count.attention
        visits = [count.work(visit) + count.attention * (len(visit) > 1) for visit in count.visits(groups)]
        flops += again * sum(visits) * ours + one * ours
        # the last of the dense stream's visits takes it past the layer
        flops += (again * sum(visits) if options.fits_dense else one) * dense
        seen = max(seen, sum(group.columns + group.rows for group in groups))
    batch = max(count.length, min(BATCH_TOKENS, ours))
    held = (2 if options.fits_dense else 1) * FLOAT * batch * seen
    # a product of this many operations leaves a number for each `2 * width` of them
    return Part("forwards", flops, FLOAT * SEEN_PASSES * flops / (2 * count.width), count.base + held)


def _statistics(count: Counting) -> Part:
    options = count.options
    tokens = (count.samples + count.held_out) * count.length
    # a sum holds one part for each power of two, and the term that is open; that of held-out rows is one
    terms = min(CHUNKS, math.ceil(tokens / max(count.length, BATCH_TOKENS)))
    part = Part("statistics", 0, 0, count.base + count.moments * (2 + math.floor(math.log2(max(terms, 1)))) / 2)
    for group in _groups(count):
        met = tokens * group.share
        part.flops += 2 * met * group.columns**2
        part.bytes_moved += FLOAT * 2 * group.columns**2 * math.ceil(met / max(count.length, BATCH_TOKENS))
        if options.fits_dense and not group.expert:
            part.flops += 2 * met * group.columns * (group.rows if group.writes else group.columns)
            part.bytes_moved += FLOAT * SEEN_PASSES * met * (group.columns + group.rows)
    if options.tune:
        # before, and after with what the dense weights would have made of the same inputs
        part.flops, part.bytes_moved = 2 * part.flops, 2 * part.bytes_moved
        part.flops += sum(2 * tokens * group.share * group.weights for group in _groups(count)) * options.fits_dense
    return part


def _target(count: Counting) -> Part:
    flops = sum(
        (2 if group.writes else 4) * group.weights * group.columns + group.columns**3 / 3 for group in _groups(count)
    )
    return Part("target", flops, 0, _solving(count, 3, 0, 2))


def _admm(count: Counting) -> Part:
    keeps = count.options.mask == "keep"
    steps, choices = (ADMM_ITERATIONS - ADMM_SELECTIONS, 0) if keeps else (ADMM_ITERATIONS, ADMM_SELECTIONS)
    part = Part("zeros by ADMM", 0, 0, _solving(count, 9, 0, 2))
    for group in _groups(count):
        if keeps or group.prunes:
            part.flops += 2 * (steps + 1) * group.weights * group.columns + group.columns**3
            part.bytes_moved += (steps * ADMM_BYTES + choices * SELECT_BYTES) * group.weights
    return part


def _factors(group: Group) -> float:
    """A Cholesky factor, the inverse from it, and the factor of that."""
    return 4 / 3 * group.columns**3


def _kept(count: Counting) -> int:
    """Copies of all matrices of an input that are there while their units are rounded."""
    return 1 + bool(count.options.fits_dense) + (count.options.mask == "admm" and count.options.prunes)


def _sweep(count: Counting) -> Part:
    part = Part("sweep", 0, 0, _solving(count, _kept(count), 7, 3))
    for group in _groups(count):
        part.flops += group.weights * group.columns + _factors(group)
        part.bytes_moved += (COLUMNS_BYTES + CLIP_BYTES * group.rounds) * group.weights
    return part


def _refine(count: Counting) -> Part:
    passes = count.options.refine
    part = Part(f"refine, {passes} pass{'es' if passes > 1 else ''}", 0, 0, _solving(count, _kept(count), 8, 3))
    for group in _groups(count):
        inner = group.members[0].group or group.columns
        part.flops += passes * group.weights * 2 * (group.columns + inner)
        part.bytes_moved += passes * COLUMNS_BYTES * group.weights
    return part


def _rounding(count: Counting, texts: bool) -> Part:
    moved = sum((SELECT_BYTES * group.prunes + CLIP_BYTES * group.rounds) * group.weights for group in _groups(count))
    most = max(matrix.rows * matrix.columns for matrix in count.plan.matrices)
    held = count.base + count.moments if texts else 0
    return Part("zeros and rounding", 0, moved, held + FLOAT * 6 * most)


def _errors(count: Counting) -> Part:
    """Of every matrix on both texts, and what a sweep took itself to cost."""
    each = 8 + 2 * (count.options.method == "gptq")
    flops = sum(each * group.weights * group.columns for group in _groups(count))
    return Part("errors", flops, 0, _solving(count, _kept(count), 4, 2))


def _sequences(count: Counting, tokens: int) -> int:
    """Tokens of a step that takes whole sequences."""
    return max(1, min(tokens // count.length, count.samples)) * count.length


def _budget(count: Counting) -> Part:
    options = count.options
    tokens = min(BUDGET_SEQUENCES, count.samples) * count.length
    works = [count.work(groups) + count.attention for groups in count.layers]
    logits = tokens * count.table / count.width
    walked = count.samples * count.length
    squares = [sum(group.columns**2 for group in groups) for groups in count.layers]
    part = Part("budget", 0, 0, FLOAT * (count.whole + 6 * count.largest + max(squares) + 6 * logits))
    part.flops += 2 * walked * sum(works) + tokens * (sum(works) + 2 * count.table)
    part.flops += sum(2 * walked * group.share * group.columns**2 for group in _groups(count))
    for kind, deals, tried in (("zeros", options.deals_zeros, ZEROS_TRIED), ("bits", options.deals_bits, BITS_TRIED)):
        if not deals:
            continue
        for index, groups in enumerate(count.layers):
            # bits go to all matrices of an input at once; all experts are one unit, or one for each of their matrices
            units = sum(1 if kind == "bits" else len(group.members) for group in groups if not group.expert)
            units += 1 if any(group.expert for group in groups) else 0
            part.flops += units * tokens * (sum(works[index:]) + 2 * count.table)
            part.bytes_moved += units * LOGIT_PASSES * FLOAT * logits
        for group in _groups(count):
            part.flops += tried * 3 * group.weights * group.columns + len(group.members) * _factors(group)
            part.bytes_moved += tried * COLUMNS_BYTES * group.weights
    return part


def _tune(count: Counting) -> Part:
    steps, tokens = count.options.tune, _sequences(count, TUNE_TOKENS)
    part = Part(f"tune, {steps} steps")
    everything = (count.samples + count.held_out) * count.length
    for groups in count.layers:
        one = count.work(groups) + count.attention
        tuned = sum(group.weights for group in groups if not group.expert)
        part.flops += steps * tokens * 3 * one + everything * one
        part.bytes_moved += steps * (ADAM_BYTES * tuned + FLOAT * SEEN_PASSES * 3 * tokens * count.width)
    seen = max(sum(group.columns + group.rows for group in groups) for groups in count.layers)
    # weights, gradients, both moments, and all of it twice more while it goes to disk; what backward needs of a step
    part.peak_bytes = count.base + FLOAT * (16 * count.largest + 5 * tokens * seen)
    return part


def _polish(count: Counting) -> Part:
    steps, tokens = count.options.polish, _sequences(count, POLISH_TOKENS)
    layers = sum(count.work(groups) + count.attention for groups in count.layers)
    weights = sum(group.weights for group in _groups(count))
    logits = tokens * count.table / count.width
    part = Part(f"polish, {steps} steps")
    # the head once for the dense model and, like the layers, forward and backward for the compressed one
    part.flops = steps * tokens * (3 * layers + 4 * 2 * count.table)
    part.bytes_moved = steps * (FLOAT * LOGIT_PASSES * logits + ADAM_BYTES * weights)
    seen = sum(group.columns + group.rows for group in _groups(count))
    part.peak_bytes = FLOAT * (count.whole + 5 * weights + 6 * logits + 2 * tokens * seen)
    return part


def totals(found: Sequence[Part]) -> Mapping[str, int]:
    """Operations and bytes of all steps together, and the most that any holds."""
    told = [part.told() for part in found]
    return {
        "flops": sum(part["flops"] for part in told),
        "bytes_moved": sum(part["bytes_moved"] for part in told),
        "peak_bytes": max(part["peak_bytes"] for part in told),
    }
