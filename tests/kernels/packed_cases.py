"""Inputs for the products by packed codes, and how their results are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from rewright.kernels.bitmask.reference import pack_bitmask
from rewright.kernels.pack.reference import pack
from tests.kernels.bounds import Bounds, Verdict, on
from tests.kernels.case import DTYPES, Case, laid_out, normal

Results = tuple[torch.Tensor, ...]
OPS = ("w4a16_gemv", "w4a16_gemm", "w4a16_gemm_dx", "bitmask_w4_gemv")


def codes_of(generator: torch.Generator, rows: int, columns: int, bits: int) -> torch.Tensor:
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)


def _scales(generator: torch.Generator, rows: int, groups: int, stored: torch.dtype) -> torch.Tensor:
    scale = (0.2 + torch.rand(rows, groups, generator=generator, dtype=torch.float64)) / 8
    scale[::5] = 0.0
    return scale.to(stored)


def _product(
    op: str,
    size: tuple[int, int, int],
    groups: int,
    dtype: torch.dtype,
    *,
    bits: int = 4,
    extra: str = "",
    stored: torch.dtype = torch.bfloat16,
    layout: str = "rows",
) -> Case:
    """`extra` names what there is besides codes and scales: `zero`, `bias`."""
    m, n, k = size

    def build(generator: torch.Generator) -> dict[str, Any]:
        given: dict[str, Any] = {
            "packed": pack(codes_of(generator, n, k, bits), bits),
            "scale": laid_out(_scales(generator, n, groups, stored), layout),
            "zero": laid_out(codes_of(generator, n, groups, bits), layout) if "zero" in extra else None,
            "bits": bits,
        }
        name, width = ("dy", n) if op == "w4a16_gemm_dx" else ("x", k)
        given[name] = laid_out(normal(generator, m, width).to(dtype), layout)
        if op != "w4a16_gemm_dx":
            given["bias"] = normal(generator, n).to(stored) if "bias" in extra else None
        return given

    kinds = "-".join(filter(None, (extra, str(stored).removeprefix("torch."), layout)))
    return Case(op, f"{m}x{n}x{k}-{groups}groups-{bits}bit-{kinds}", dtype, build)


def _identity(op: str, n: int, k: int, groups: int, dtype: torch.dtype) -> Case:
    """A product by the identity is the decoded matrix: equal to the last bit."""

    def build(generator: torch.Generator) -> dict[str, Any]:
        given = _product(op, (1, n, k), groups, dtype, extra="zero", stored=_stored(dtype)).build(generator)
        name, side = ("dy", n) if op == "w4a16_gemm_dx" else ("x", k)
        return given | {name: torch.eye(side, dtype=dtype)}

    return Case(op, f"identity-{n}x{k}-{groups}groups", dtype, build, exact=True)


def _stored(dtype: torch.dtype) -> torch.dtype:
    """In the interpreter no operand may be bfloat16."""
    return {torch.bfloat16: torch.bfloat16, torch.float64: torch.float64}.get(dtype, torch.float16)


def product_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        stored = _stored(dtype)
        for size, groups in (((0, 5, 32), 1), ((2, 0, 32), 1), ((2, 5, 0), 1), ((1, 1, 8), 1), ((8, 7, 64), 4)):
            for op in OPS[:3]:
                yield _product(op, size, groups, dtype, extra="zero-bias", stored=stored)
        # A group of one, two, three, four and five words; of a prime of words; of all columns, and more than a step.
        for columns, groups in ((40, 5), (48, 3), (72, 3), (96, 3), (120, 3), (112, 2), (424, 1), (2120, 1)):
            for op, m in zip(OPS[:3], (3, 17, 17), strict=True):
                yield _product(op, (m, 13, columns), groups, dtype, extra="bias", stored=stored)
        for op, m in zip(OPS[:3], (5, 67, 67), strict=True):
            yield _product(op, (m, 71, 256), 2, dtype, extra="zero-bias", stored=stored, layout="slice")
            yield _product(op, (m, 37, 96), 3, dtype, extra="zero", stored=stored, layout="columns")
            yield _product(
                op, (2, 3, 2304), 18, dtype, stored=torch.float64 if dtype == torch.float64 else torch.float32
            )
            for bits in (2, 8):
                yield _product(op, (m, 9, 128), 4, dtype, bits=bits, extra="zero", stored=stored)
        for op in OPS[1:3]:
            yield _identity(op, 19, 64, 2, dtype)


def bitmask_case(
    m: int,
    n: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    bias: bool = True,
    stored: torch.dtype = torch.bfloat16,
    layout: str = "rows",
) -> Case:
    """`shape` is the groups of a row, the columns of a group and how many of those are kept."""
    groups, group, nnz = shape

    def build(generator: torch.Generator) -> dict[str, Any]:
        codes = codes_of(generator, n, groups * group, 4).view(n, groups, group)
        place = torch.rand(n, groups, group, generator=generator).argsort(dim=2)
        mask, values = pack_bitmask(codes.masked_fill(place >= nnz, 0).view(n, groups * group), group, nnz)
        return {
            "x": laid_out(normal(generator, m, groups * group).to(dtype), layout),
            "mask": mask,
            "values": values,
            "scale": laid_out(_scales(generator, n, groups, stored), layout),
            "bias": normal(generator, n).to(stored) if bias else None,
        }

    label = (
        f"{m}x{n}x{groups}groups-{nnz}of{group}-{'bias-' if bias else ''}{str(stored).removeprefix('torch.')}-{layout}"
    )
    return Case("bitmask_w4_gemv", label, dtype, build)


def product_bitmask_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        stored = _stored(dtype)
        for m, n, groups in ((0, 3, 2), (2, 0, 2), (2, 3, 0), (1, 1, 1), (8, 7, 3)):
            yield bitmask_case(m, n, (groups, 32, 16), dtype, stored=stored)
        for shape in ((5, 8, 2), (3, 16, 16), (2, 24, 10), (3, 48, 30), (2, 96, 48), (20, 128, 64), (2, 256, 24)):
            yield bitmask_case(3, 9, shape, dtype, stored=stored)
        # One group, longer than a step.
        yield bitmask_case(1, 5, (1, 2120, 1000), dtype, stored=stored)
        for layout in ("slice", "columns"):
            yield bitmask_case(5, 11, (3, 64, 32), dtype, bias=False, stored=stored, layout=layout)


def packed_cases() -> list[Case]:
    """Every case of these ops, in a fixed order."""
    return [*product_cases(), *product_bitmask_cases()]


def weight_of(given: dict[str, Any]) -> torch.Tensor:
    """The matrix W in float64, element by element: written apart from the ops."""
    scale = given["scale"].double()
    groups = scale.shape[1]
    if "mask" in given:
        rows, _, length = given["mask"].shape
        bits = (given["mask"][..., None] >> torch.arange(8)) & 1
        keep = bits.reshape(rows, groups, 8 * length).bool()
        halves = torch.stack((given["values"] & 15, given["values"] >> 4), dim=-1)
        level = torch.zeros(keep.shape, dtype=torch.float64)
        level[keep] = halves.flatten().double() - 8
    else:
        bits = given["bits"]
        rows, words = given["packed"].shape
        codes = (given["packed"][:, :, None].long() >> (bits * torch.arange(32 // bits))) & ((1 << bits) - 1)
        level = codes.reshape(rows, groups, words * 32 // bits // groups).double() - (1 << (bits - 1))
        if given["zero"] is not None:
            level -= given["zero"].double()[:, :, None]
    weight: torch.Tensor = (level * scale[:, :, None]).reshape(rows, groups * level.shape[2])
    return weight


def _judge(case: Case, got: Results, base: Results) -> Verdict:
    given = case.make()
    W = weight_of(given)
    x = given["dy"].double() if "dy" in given else given["x"].double()
    matrix = W if "dy" in given else W.t()
    truth, scale = x @ matrix, x.abs() @ matrix.abs()
    bias = on(given, "cpu", torch.float64).get("bias")
    if bias is not None:
        truth, scale = truth + bias, scale + bias.abs()
    bounds = Bounds(case.dtype)
    bounds.add("y", got[0].double() - truth, base[0].double() - truth, scale)
    bounds.check("y has another dtype", got[0].dtype == case.dtype)
    bounds.check("y has another shape", got[0].shape == truth.shape)
    return bounds.verdict()


PACKED_JUDGES: dict[str, Callable[[Case, Results, Results], Verdict]] = dict.fromkeys(OPS, _judge)
