"""Inputs for every op: shapes with 0, 1 and primes, strided views, every dtype, made the same way each time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from rewright.kernels.bitmask import pack_bitmask
from tests.kernels.case import DTYPES, Builder, Case, laid_out, normal
from tests.kernels.loss_cases import loss_cases
from tests.kernels.modal_cases import modal_cases
from tests.kernels.neuron_cases import neuron_cases
from tests.kernels.packed_cases import packed_cases
from tests.kernels.solver_cases import solver_cases


def _hessian_update(n: int, c: int, x: torch.dtype, h: torch.dtype, h_layout: str, x_layout: str) -> Case:
    def build(generator: torch.Generator) -> dict[str, Any]:
        seed = normal(generator, c, c)
        symmetric = (seed @ seed.t()).tril()
        symmetric += symmetric.tril(-1).t()
        X = (normal(generator, n, c) * (1 + normal(generator, c).abs())).to(x)
        # One over a power of two reaches the kernel unrounded, also where it computes in float64.
        return {"H": laid_out(symmetric.to(h), h_layout), "X": laid_out(X, x_layout), "alpha": 2.0 / 64}

    short = {torch.float32: "", torch.float64: "-into64"}[h] if x != h else ""
    return Case("hessian_update", f"{n}x{c}-{h_layout}-{x_layout}{short}", x, build)


def hessian_update_cases() -> Iterator[Case]:
    shapes = ((0, 5), (3, 0), (1, 1), (7, 13), (64, 33), (67, 97), (40, 160))
    for dtype in DTYPES:
        h = torch.float64 if dtype == torch.float64 else torch.float32
        for n, c in shapes:
            yield _hessian_update(n, c, dtype, h, "rows", "rows")
        for h_layout, x_layout in (("slice", "columns"), ("columns", "slice")):
            yield _hessian_update(29, 71, dtype, h, h_layout, x_layout)
        yield _hessian_update(5, 263, dtype, h, "rows", "rows")
    yield _hessian_update(19, 23, torch.float32, torch.float64, "rows", "rows")
    yield _hessian_update(19, 23, torch.float16, torch.float64, "rows", "rows")
    yield _hessian_update(19, 23, torch.float64, torch.float32, "rows", "rows")


def factor_of(generator: torch.Generator, width: int) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of a damped Hessian of correlated inputs, float64."""
    if width == 0:
        return torch.zeros(0, 0, dtype=torch.float64)
    X = normal(generator, 3 * width + 1, width) @ (
        torch.eye(width, dtype=torch.float64) + normal(generator, width, width) / (2 * width**0.5)
    )
    H = X.t() @ X / len(X)
    H += 0.01 * H.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    factor: torch.Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    return factor


def _joint_sweep(r: int, width: int, dtype: torch.dtype, kind: str, layout: str = "columns") -> Case:
    def build(generator: torch.Generator) -> dict[str, Any]:
        weight = normal(generator, r, width) / 16
        keep = torch.rand(r, width, generator=generator) > 0.4
        scale = weight.abs().amax(dim=1) / 7.5 if width else weight.new_ones(r)
        if kind == "dead":
            scale[::3] = 0.0
        zero = torch.randint(-5, 5, (r,), generator=generator, dtype=torch.int8)
        return {
            "weight": laid_out(weight.to(dtype), layout),
            "factor": laid_out(factor_of(generator, width).to(dtype), "slice" if layout == "slice" else "rows"),
            "scale": None if kind == "prune" else scale.to(dtype),
            "zero": zero if kind == "asymmetric" else None,
            "keep": None if kind == "quantise" else laid_out(keep, layout),
            "low": -8,
            "high": 7,
        }

    return Case("joint_sweep", f"{r}x{width}-{kind}-{layout}", dtype, build)


def _dyadic_sweep(r: int, width: int, dtype: torch.dtype) -> Case:
    """Weights, factor and scales in small powers of two: all sums are exact, ties are frequent, codes must agree."""

    def build(generator: torch.Generator) -> dict[str, Any]:
        weight = torch.randint(-48, 49, (r, width), generator=generator).to(dtype) / 4
        factor = torch.eye(width, dtype=dtype)
        steps = torch.randint(-1, 2, (2, width), generator=generator).to(dtype) / 2
        for k in (1, 2):
            factor.diagonal(k).copy_(steps[k - 1, : width - k])
        return {
            "weight": laid_out(weight, "columns"),
            "factor": factor,
            "scale": torch.full((r,), 0.5, dtype=dtype),
            "zero": torch.randint(-3, 4, (r,), generator=generator, dtype=torch.int32),
            "keep": torch.rand(r, width, generator=generator) > 0.2,
            "low": -32,
            "high": 31,
        }

    return Case("joint_sweep", f"{r}x{width}-dyadic", dtype, build, exact=True)


def joint_sweep_cases() -> Iterator[Case]:
    shapes = ((0, 8), (5, 0), (1, 1), (7, 13), (37, 32), (33, 31), (18, 64), (19, 127), (16, 128))
    for dtype in DTYPES:
        for r, width in shapes:
            yield _joint_sweep(r, width, dtype, "asymmetric")
        for kind in ("prune", "quantise", "joint", "dead"):
            yield _joint_sweep(23, 17, dtype, kind)
        yield _joint_sweep(23, 17, dtype, "asymmetric", "rows")
        yield _joint_sweep(23, 37, dtype, "asymmetric", "slice")
        # More rows than the reference takes at a time.
        yield _joint_sweep(2053, 3, dtype, "joint")
        yield _dyadic_sweep(31, 11, dtype)


def _packing(bits: int, rows: int, columns: int, layout: str) -> Builder:
    def build(generator: torch.Generator) -> dict[str, Any]:
        half = 1 << (bits - 1)
        codes = torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)
        return {"codes": laid_out(codes, layout), "bits": bits}

    return build


def _unpacking(bits: int, rows: int, columns: int, layout: str) -> Builder:
    def build(generator: torch.Generator) -> dict[str, Any]:
        words = torch.randint(
            -(1 << 31), 1 << 31, (rows, -(-columns * bits // 32)), generator=generator, dtype=torch.int64
        )
        return {"packed": laid_out(words.to(torch.int32), layout), "bits": bits, "columns": columns}

    return build


def pack_cases() -> Iterator[Case]:
    shapes = ((0, 7), (3, 0), (1, 1), (5, 31), (3, 33), (2, 97), (2, 1153))
    for bits in (2, 3, 4, 8):
        for rows, columns in shapes:
            for layout in ("rows", "columns", "slice") if rows == 5 else ("rows",):
                label = f"{bits}bit-{rows}x{columns}-{layout}"
                yield Case("pack", label, torch.int8, _packing(bits, rows, columns, layout), exact=True)
                yield Case("unpack", label, torch.int8, _unpacking(bits, rows, columns, layout), exact=True)


def masked_codes(generator: torch.Generator, rows: int, columns: int, group: int, nnz: int) -> torch.Tensor:
    """4-bit codes of which no group has more than `nnz` that are not 0, and some have fewer."""
    order = torch.rand(rows, columns // group if group else 0, group, generator=generator)
    keep = order.argsort(dim=2).argsort(dim=2) < nnz
    codes = torch.randint(-8, 8, (rows, columns), generator=generator).to(torch.int8)
    codes[1::3] *= torch.randint(0, 2, codes[1::3].shape, generator=generator).to(torch.int8)
    return codes * keep.view(rows, columns)


def _masking(op: str, rows: int, groups: int, group: int, nnz: int, layout: str) -> Builder:
    def build(generator: torch.Generator) -> dict[str, Any]:
        codes = masked_codes(generator, rows, groups * group, group, nnz)
        if op == "pack_bitmask":
            return {"codes": laid_out(codes, layout), "group": group, "nnz": nnz}
        mask, values = pack_bitmask(codes, group, nnz)
        if layout == "slice":
            return {"mask": mask.repeat(1, 1, 2)[..., : mask.shape[2]], "values": values.repeat(2, 1, 1)[:rows]}
        return {"mask": mask, "values": values}

    return build


def bitmask_cases() -> Iterator[Case]:
    # group sizes that are no power of two, and one wider than a program looks at
    shapes = ((0, 2, 8, 4), (3, 0, 8, 4), (1, 1, 8, 2), (5, 3, 8, 8), (7, 3, 32, 16), (3, 5, 128, 64), (2, 3, 24, 10))
    for rows, groups, group, nnz in (*shapes, (2, 1, 2088, 1044), (3, 2, 1160, 6)):
        for layout in ("rows", "columns", "slice") if rows == 7 else ("rows",):
            label = f"{rows}x{groups}x{nnz}of{group}-{layout}"
            for op in ("pack_bitmask", "unpack_bitmask"):
                yield Case(op, label, torch.int8, _masking(op, rows, groups, group, nnz, layout), exact=True)


def _drawing(count: int, seed: int, counter: int) -> Builder:
    return lambda _: {"count": count, "seed": seed, "counter": counter}


def rng_cases() -> Iterator[Case]:
    draws = ((0, 3, 0), (1, 0, 0), (7, (1 << 64) - 1, 5), (1031, (1 << 40) + 3, 1 << 40))
    edges = ((1024, 1, (1 << 32) - 3), (9, 1 << 63, (1 << 31) - 1), (6, (1 << 32) - 1, 1 << 31))
    for count, seed, counter in (*draws, *edges):
        label = f"{count}-{seed:x}-{counter:x}"
        yield Case("rng", label, torch.int32, _drawing(count, seed, counter), exact=True)


def all_cases() -> list[Case]:
    """Every case of every op, in a fixed order."""
    return [
        *hessian_update_cases(),
        *joint_sweep_cases(),
        *solver_cases(),
        *pack_cases(),
        *bitmask_cases(),
        *rng_cases(),
        *packed_cases(),
        *loss_cases(),
        *modal_cases(),
        *neuron_cases(),
    ]
