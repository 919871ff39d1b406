"""Inputs for the ops on predicted neurons, how they are called, and how their results are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from rewright.kernels.dispatch import use
from rewright.kernels.neurons import BLOCK
from rewright.kernels.predictor_in import predictor_in
from rewright.kernels.predictor_out import predictor_out
from rewright.kernels.reduce_add import reduce_add
from rewright.kernels.sparse_mlp import sparse_mlp
from rewright.kernels.thresholded_linear import thresholded_linear
from tests.kernels.bounds import SLACK, Bounds, Verdict, on
from tests.kernels.case import DTYPES, Case, laid_out, normal

Results = tuple[torch.Tensor, ...]
Given = dict[str, Any]


def lists_of(active: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`index` and `count` of a mask, one by one. What is not meant would be found nowhere."""
    blocks = -(-len(active) // BLOCK)
    index, count = torch.full((blocks, BLOCK), 1 << 30, dtype=torch.int32), torch.zeros(blocks, dtype=torch.int32)
    for neuron in active.nonzero()[:, 0].tolist():
        block = neuron // BLOCK
        index[block, int(count[block])] = neuron
        count[block] += 1
    return index, count


def _factor(generator: torch.Generator, rows: int, columns: int, dtype: torch.dtype, coded: bool) -> Results:
    """A factor of a predictor, and the scales of its rows if it is of codes."""
    if not coded:
        return (laid_out((normal(generator, rows, columns) / 4).to(dtype), "rows"),)
    codes = torch.randint(-127, 128, (rows, columns), generator=generator).to(torch.int8)
    return codes, (torch.rand(rows, generator=generator, dtype=torch.float64) / 64).float()


def _in(size: tuple[int, int, int], dtype: torch.dtype, coded: bool = False, layout: str = "rows") -> Case:
    batch, width, rank = size

    def build(generator: torch.Generator) -> Given:
        a, *scale = _factor(generator, rank, width, dtype, coded)
        given = {"x": laid_out(normal(generator, batch, width).to(dtype), layout), "a": laid_out(a, layout)}
        return given | {"a0": normal(generator, rank).float(), "a_scale": scale[0] if scale else None}

    return Case("predictor_in", f"{'x'.join(map(str, size))}-{layout}{'-int8' if coded else ''}", dtype, build)


def _in_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        if dtype == torch.float64:
            for size in ((0, 3, 2), (2, 0, 3), (2, 3, 0), (1, 1, 1)):
                yield _in(size, dtype)
        yield _in((1, 61, 7), dtype, coded=True)
        # More columns than a program takes at once.
        yield _in((13, 523, 5), dtype, layout="slice")


def _out(
    size: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    coded: bool = False,
    exact: bool = False,
    shift: float = -0.5,
    layout: str = "rows",
) -> Case:
    batch, rank, neurons = size

    def build(generator: torch.Generator) -> Given:
        b, *scale = _factor(generator, neurons, rank, torch.float32 if dtype == torch.float64 else dtype, coded)
        t, c = normal(generator, batch, rank).to(torch.promote_types(dtype, torch.float32)), normal(generator, neurons)
        if exact:
            # Small integers: every sum is exact, and many scores are 0.
            b, t, c = ((4 * values).round() for values in (b, t / 2, c))
        c[::5] = -torch.inf
        given = {"t": laid_out(t, layout), "b": laid_out(b, layout), "c": c.float()}
        return given | {"b_scale": scale[0] if scale else None, "shift": torch.tensor(shift) if coded else shift}

    kinds = "-".join(filter(None, (layout, "int8" if coded else "", "exact" if exact else "", f"{shift:g}")))
    return Case("predictor_out", f"{'x'.join(map(str, size))}-{kinds}", dtype, build, exact)


def _out_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        if dtype == torch.float64:
            for size in ((0, 3, 5), (2, 0, 130), (2, 3, 0), (1, 1, 1)):
                yield _out(size, dtype)
        # The last block is not full.
        yield _out((1, 67, 389), dtype, coded=True)
        yield _out((13, 37, 261), dtype, layout="slice")
        for size in ((1, 9, 259), (16, 9, 259)):
            yield _out(size, dtype, exact=True)
        if dtype == torch.float32:
            # Nobody passes, and all but those that never do.
            for shift in (-1024.0, 1024.0):
                yield _out((3, 5, 200), dtype, shift=shift)


def _mlp(
    size: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    density: float = 0.3,
    extra: str = "",
    activation: str = "relu",
    layout: str = "rows",
) -> Case:
    """`extra` names what there is besides two matrices: `bias`, `gate`, `offset`."""
    batch, width, neurons = size

    def build(generator: torch.Generator) -> Given:
        def matrix() -> torch.Tensor:
            return laid_out((normal(generator, neurons, width) / max(width, 1) ** 0.5).to(dtype), layout)

        index, count = lists_of(torch.rand(neurons, generator=generator) < density)
        given: Given = {"x": laid_out(normal(generator, batch, width).to(dtype), layout)}
        given |= {"up": matrix(), "down": matrix(), "index": index, "count": count, "activation": activation}
        given |= {"gate": matrix() if "gate" in extra else None}
        for name, there in (("bias", "bias"), ("gate_bias", "gatebias"), ("offset", "offset")):
            given[name] = normal(generator, neurons).to(dtype) if there in extra else None
        if given["offset"] is not None:
            given["offset"] = given["offset"].abs().float()
        return given

    kinds = "-".join(filter(None, (layout, f"{density:g}", activation, extra)))
    return Case("sparse_mlp", f"{'x'.join(map(str, size))}-{kinds}", dtype, build)


def _mlp_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        if dtype == torch.float64:
            for size in ((0, 3, 5), (2, 0, 130), (2, 3, 0), (1, 1, 1)):
                yield _mlp(size, dtype, density=1.0)
        # More columns than a program takes at once, and more neurons.
        yield _mlp((1, 2063, 389), dtype, density=0.05, extra="bias")
        yield _mlp((3, 37, 261), dtype, extra="bias-gate-gatebias-offset", layout="slice")
        if dtype == torch.float32:
            yield _mlp((1, 37, 300), dtype, density=0.0, extra="bias")
            yield _mlp((1, 37, 300), dtype, density=0.9, extra="bias-offset", activation="relu2")
            yield _mlp((16, 19, 131), dtype, density=1.0, extra="gate", activation="relu2")


def _reduce(
    size: tuple[int, int, int], dtype: torch.dtype, *, bias: bool = True, residual: bool = True, layout: str = "rows"
) -> Case:
    def build(generator: torch.Generator) -> Given:
        parts, batch, width = size
        wide = torch.promote_types(dtype, torch.float32)
        base = torch.full((parts, batch, width + 3), torch.nan, dtype=wide)
        base[:, :, :width] = normal(generator, *size).to(wide)
        given: Given = {"partial": base[:, :, :width], "dtype": dtype}
        given["bias"] = normal(generator, width).to(dtype) if bias else None
        given["residual"] = laid_out(normal(generator, batch, width).to(dtype), layout) if residual else None
        return given

    label = f"{'x'.join(map(str, size))}-{layout}{'-bias' if bias else ''}{'-residual' if residual else ''}"
    return Case("reduce_add", label, dtype, build)


def _reduce_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        if dtype == torch.float64:
            for size in ((0, 2, 3), (2, 0, 3), (2, 3, 0), (1, 1, 1)):
                yield _reduce(size, dtype)
        yield _reduce((1, 1, 37), dtype, residual=False)
        # More parts than a program takes at once.
        yield _reduce((67, 3, 41), dtype, layout="slice")


def _thresholded(size: tuple[int, int, int], dtype: torch.dtype, *, density: float = 0.3, layout: str = "rows") -> Case:
    def build(generator: torch.Generator) -> Given:
        batch, width, outputs = size
        x = normal(generator, batch, width).to(dtype)
        threshold = torch.full((width,), -1.0 if density == 1 else torch.inf if density == 0 else 1.0)
        if 0 < density < 1:
            # some rows have columns of their own, and some columns no row
            drawn = torch.rand(batch, width, generator=generator, dtype=torch.float64) < density
            x = torch.where(drawn, x.sign() * (1.25 + x.abs()), x / 64)
        weight = laid_out(normal(generator, width, outputs).to(dtype), layout)
        return {"x": laid_out(x, layout), "weight_t": weight, "threshold": threshold}

    return Case("thresholded_linear", f"{'x'.join(map(str, size))}-{layout}-{density:g}", dtype, build)


def _thresholded_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        if dtype == torch.float64:
            for size in ((0, 3, 5), (2, 0, 7), (2, 3, 0), (1, 1, 1)):
                yield _thresholded(size, dtype, density=1.0)
        # More outputs than a program takes.
        yield _thresholded((1, 131, 523), dtype, density=0.1)
        yield _thresholded((3, 37, 61), dtype, layout="slice")
        if dtype == torch.float32:
            yield _thresholded((1, 37, 61), dtype, density=0.0)
            yield _thresholded((1, 37, 61), dtype, density=0.8)
            yield _thresholded((16, 23, 131), dtype, density=0.05)
            yield _thresholded((5, 23, 131), dtype, density=1.0)


def neuron_cases() -> list[Case]:
    """Every case of these ops, in a fixed order."""
    return [*_in_cases(), *_out_cases(), *_mlp_cases(), *_reduce_cases(), *_thresholded_cases()]


def _lists(given: Given) -> Results:
    """What the lists mean: entries past the counts become -1."""
    index, count = predictor_out(**given)
    meant = torch.arange(BLOCK, device=count.device) < count[:, None]
    return torch.where(meant, index, -1), count


def _total(op: Callable[..., torch.Tensor]) -> Callable[[Given], Results]:
    """The sum over the partials, of which an implementation may have any number."""

    def total(given: Given) -> Results:
        partial = op(**given)
        return (partial.double().sum(dim=0).to(partial.dtype),)

    return total


def _reduced(given: Given) -> Results:
    # The truth is asked for in float64 by its operands, and is not rounded after that.
    wide = given["partial"].dtype
    return (reduce_add(**(given | {"dtype": wide if wide == torch.float64 else given["dtype"]})),)


OPS: dict[str, Callable[[Given], Results]] = {
    "predictor_in": lambda given: (predictor_in(**given),),
    "predictor_out": _lists,
    "sparse_mlp": _total(sparse_mlp),
    "reduce_add": _reduced,
    "thresholded_linear": _total(thresholded_linear),
}


def _sizes(given: Given) -> Given:
    """Arguments of which every sum has the absolute values of its terms."""
    plain = {name: t.abs() if isinstance(t, torch.Tensor) else t for name, t in given.items()}
    if plain.get("offset") is not None:
        plain["offset"] = -plain["offset"]
    return plain


def _judge(case: Case, got: Results, base: Results) -> Verdict:
    given = on(case.make(), "cpu", torch.float64)
    with use("reference"):
        (truth,), (scale,) = OPS[case.op](given), OPS[case.op](_sizes(given))
    bounds = Bounds(base[0].dtype)
    bounds.add("result", got[0].double() - truth, base[0].double() - truth, scale)
    bounds.check("another dtype", got[0].dtype == base[0].dtype)
    bounds.check("another shape", got[0].shape == truth.shape)
    return bounds.verdict()


def _judge_lists(case: Case, got: Results, base: Results) -> Verdict:
    """A neuron may be listed or not where its score is 0 up to the bound; all else is exact."""
    given = on(case.make(), "cpu", torch.float64)
    t, b, c, shift = (given[name] for name in ("t", "b", "c", "shift"))
    scale = 1.0 if given["b_scale"] is None else given["b_scale"]
    score = (t @ b.double().t()) * scale + c + shift
    size = (t.abs() @ b.double().abs().t()) * scale + c.nan_to_num(neginf=0.0).abs() + abs(shift)
    bounds = Bounds(torch.promote_types(case.dtype, torch.float32))
    limit = SLACK * bounds.eps * size.max().item() if size.numel() else 0.0
    best = score.amax(dim=0) if len(t) else torch.full_like(c, -torch.inf)
    index, count = got
    sure, at_all = best > limit, best > -limit
    listed = torch.zeros(len(c) + 1, dtype=torch.bool)
    listed[index.long()] = True
    listed = listed[:-1]
    bounds.check("a neuron that is active is not listed", bool((listed | ~sure).all()))
    bounds.check("a neuron that is not active is listed", bool((at_all | ~listed).all()))
    exact_index, exact_count = lists_of(listed)
    meant = torch.where(exact_index == 1 << 30, -1, exact_index)
    bounds.check("lists are not ascending, or counts are wrong", torch.equal(index, meant))
    bounds.check("counts are wrong", torch.equal(count, exact_count))
    bounds.check("another dtype", index.dtype == count.dtype == torch.int32)
    bounds.check("another shape", index.shape == base[0].shape)
    return bounds.verdict()


NEURON_JUDGES: dict[str, Callable[[Case, Results, Results], Verdict]] = dict.fromkeys(OPS, _judge)
NEURON_JUDGES["predictor_out"] = _judge_lists
