"""Inputs for the ops that choose zeros, grids and codes; `cases.py` has the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tests.kernels.case import DTYPES, Builder, Case, laid_out, normal

CLIPS = tuple(1 - 0.025 * step for step in range(25))


def _cross_update(n: int, a: int, b: int, dtypes: tuple[torch.dtype, ...], layouts: tuple[str, str, str]) -> Case:
    total, left, right = dtypes

    def build(generator: torch.Generator) -> dict[str, Any]:
        spread = 1 + normal(generator, a).abs()
        return {
            "total": laid_out(normal(generator, a, b).to(total), layouts[0]),
            "left": laid_out((normal(generator, n, a) * spread).to(left), layouts[1]),
            "right": laid_out(normal(generator, n, b).to(right), layouts[2]),
            # One over a power of two reaches the kernel unrounded, also where it computes in float64.
            "alpha": 3.0 / 64,
        }

    mixed = "" if left == right else f"-by-{str(right).removeprefix('torch.')}"
    into = "-into64" if total == torch.float64 and left != total else ""
    return Case("cross_update", f"{n}x{a}x{b}-{'-'.join(layouts)}{mixed}{into}", left, build)


def cross_update_cases() -> Iterator[Case]:
    shapes = ((0, 3, 5), (3, 0, 4), (3, 4, 0), (1, 1, 1), (7, 13, 5), (64, 33, 70), (67, 97, 131), (40, 160, 128))
    rows = ("rows", "rows", "rows")
    for dtype in DTYPES:
        into = torch.float64 if dtype == torch.float64 else torch.float32
        for n, a, b in shapes:
            yield _cross_update(n, a, b, (into, dtype, dtype), rows)
        yield _cross_update(29, 71, 83, (into, dtype, dtype), ("slice", "columns", "rows"))
        yield _cross_update(29, 71, 83, (into, dtype, dtype), ("columns", "rows", "slice"))
        if dtype != torch.float64:
            yield _cross_update(19, 70, 67, (into, dtype, torch.float32), rows)
            yield _cross_update(19, 23, 67, (torch.float64, dtype, dtype), rows)


def _descend(r: int, width: int, dtype: torch.dtype, kind: str, layout: str = "columns") -> Case:
    def build(generator: torch.Generator) -> dict[str, Any]:
        weight = normal(generator, r, width) / 16
        keep = torch.rand(r, width, generator=generator) > 0.4
        inputs = normal(generator, 3 * width + 1, width) + normal(generator, 3 * width + 1, 1) / 2
        hessian = inputs.t() @ inputs / (3 * width + 1) + 0.01 * torch.eye(width, dtype=torch.float64)
        scale = weight.abs().amax(dim=1) / 7.5 if width else weight.new_ones(r)
        zero = torch.randint(-5, 5, (r,), generator=generator, dtype=torch.int8)
        value = weight if kind == "prune" else (weight / scale[:, None]).round() * scale[:, None]
        if kind != "quantise":
            value = value * keep
        if kind == "dead":
            scale[::3] = 0.0
        return {
            "value": laid_out(value.to(dtype), layout),
            "gradient": laid_out(((value - weight) @ hessian).to(dtype), layout),
            "hessian": laid_out(hessian.to(dtype), "slice" if layout == "slice" else "rows"),
            "scale": None if kind == "prune" else scale.to(dtype),
            "zero": zero if kind == "asymmetric" else None,
            "keep": None if kind == "quantise" else laid_out(keep, layout),
            "low": -8,
            "high": 7,
        }

    return Case("descend", f"{r}x{width}-{kind}-{layout}", dtype, build)


def _dyadic_descend(r: int, width: int, dtype: torch.dtype) -> Case:
    """All numbers in small powers of two: sums and quotients are exact, ties are frequent, codes must agree."""

    def build(generator: torch.Generator) -> dict[str, Any]:
        hessian = 2 * torch.eye(width, dtype=dtype)
        steps = torch.randint(-1, 2, (2, width), generator=generator).to(dtype) / 2
        for k in (1, 2):
            hessian.diagonal(k).copy_(steps[k - 1, : width - k])
            hessian.diagonal(-k).copy_(steps[k - 1, : width - k])
        return {
            "value": laid_out(torch.randint(-9, 9, (r, width), generator=generator).to(dtype) / 2, "columns"),
            "gradient": laid_out(torch.randint(-20, 21, (r, width), generator=generator).to(dtype) / 2, "columns"),
            "hessian": hessian,
            "scale": torch.full((r,), 0.5, dtype=dtype),
            "zero": torch.randint(-3, 4, (r,), generator=generator, dtype=torch.int32),
            "keep": torch.rand(r, width, generator=generator) > 0.2,
            "low": -32,
            "high": 31,
        }

    return Case("descend", f"{r}x{width}-dyadic", dtype, build, exact=True)


def descend_cases() -> Iterator[Case]:
    shapes = ((0, 8), (5, 0), (1, 1), (7, 13), (37, 32), (33, 31), (18, 64), (19, 127), (16, 128))
    for dtype in DTYPES:
        for r, width in shapes:
            yield _descend(r, width, dtype, "asymmetric")
        for kind in ("prune", "quantise", "joint", "dead"):
            yield _descend(23, 17, dtype, kind)
        yield _descend(23, 17, dtype, "asymmetric", "rows")
        yield _descend(23, 37, dtype, "asymmetric", "slice")
        # More rows than the reference takes at a time.
        yield _descend(2053, 3, dtype, "joint")
        yield _dyadic_descend(31, 11, dtype)


def _clip_search(
    r: int, size: int, dtype: torch.dtype, stored: torch.dtype, kind: str, layout: str = "columns", bits: int = 4
) -> Case:
    def build(generator: torch.Generator) -> dict[str, Any]:
        weight = normal(generator, r, size) / 16
        weight[::5] = weight[::5].abs()
        weight[3::11] = 0
        return {
            "weight": laid_out(weight.to(dtype), layout),
            "keep": laid_out(torch.rand(r, size, generator=generator) > 0.4, layout) if "masked" in kind else None,
            "importance": normal(generator, size).square().to(dtype) if "weighted" in kind else None,
            "bits": bits,
            "symmetric": "asymmetric" not in kind,
            "shares": {"whole": (1.0,), "few": (1.0, 0.9, 0.8)}.get(kind.split("-")[-1], CLIPS),
            "stored": stored,
        }

    name = f"{r}x{size}-{bits}bit-{kind}-{layout}-{str(stored).removeprefix('torch.')}"
    return Case("clip_search", name, dtype, build)


def _dyadic_clip(r: int, size: int, dtype: torch.dtype, symmetric: bool) -> Case:
    """Each grid's step is a power of two or three quarters of one, so that all sums of squares are exact."""

    def build(generator: torch.Generator) -> dict[str, Any]:
        weight = torch.randint(-30, 31, (r, size), generator=generator).to(dtype) / 4
        weight[:, 0], weight[:, 1] = 7.5, -7.5
        return {
            "weight": laid_out(weight, "columns"),
            "keep": None,
            "importance": 2.0 ** torch.randint(-1, 2, (size,), generator=generator).to(dtype),
            "bits": 4,
            "symmetric": symmetric,
            "shares": (1.0, 0.75, 0.5),
            "stored": torch.float32,
        }

    return Case("clip_search", f"{r}x{size}-dyadic-{symmetric}", dtype, build, exact=True)


def clip_search_cases() -> Iterator[Case]:
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    for dtype in DTYPES:
        for r, size in ((0, 8), (5, 0), (1, 1), (7, 13), (37, 32), (33, 67)):
            yield _clip_search(r, size, dtype, brain, "masked-weighted")
        for stored in (half, brain, full):
            yield _clip_search(23, 17, dtype, stored, "asymmetric-masked")
        yield _clip_search(23, 17, dtype, half, "plain", "rows")
        yield _clip_search(23, 17, dtype, brain, "asymmetric-weighted", "slice", 3)
        yield _clip_search(23, 17, dtype, brain, "asymmetric-whole", "rows", 8)
        # More rows than the reference takes at a time.
        yield _clip_search(4099, 3, dtype, brain, "few", "columns", 2)
        yield _dyadic_clip(31, 11, dtype, True)
        yield _dyadic_clip(31, 11, dtype, False)


def _scores(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> Builder:
    def build(generator: torch.Generator) -> dict[str, Any]:
        score = normal(generator, *shape)
        if kind == "tied":
            score = (score * 3).round() / 3
        elif kind == "zeros":
            score = score.abs() * (torch.rand(shape, generator=generator) > 0.6)
            # -0.0 equals 0.0, so its place decides.
            score = torch.where(torch.rand(shape, generator=generator) > 0.5, score, -score)
        elif kind == "equal":
            score = torch.full(shape, -0.75, dtype=torch.float64)
        return {"score": score.to(dtype)}

    return build


def select_cases() -> Iterator[Case]:
    def largest(shape: tuple[int, ...], kind: str, dtype: torch.dtype, prune: int) -> Case:
        scores = _scores(shape, kind, dtype)
        label = f"{'x'.join(map(str, shape))}-{kind}-{prune}"
        return Case("keep_largest", label, dtype, lambda generator: {**scores(generator), "prune": prune}, exact=True)

    def of(r: int, c: int, kind: str, dtype: torch.dtype, counts: tuple[int, int], layout: str) -> Case:
        def build(generator: torch.Generator) -> dict[str, Any]:
            score = _scores((r, c), kind, dtype)(generator)["score"]
            return {"score": laid_out(score, layout), "keep": counts[0], "of": counts[1]}

        label = f"{r}x{c}-{counts[0]}of{counts[1]}-{kind}-{layout}"
        return Case("keep_of", label, dtype, build, exact=True)

    for dtype in DTYPES:
        yield from (largest((0, 3), "normal", dtype, 0), largest((1,), "normal", dtype, 1))
        for prune in (0, 1, 90, 181, 182):
            yield largest((2, 7, 13), "normal", dtype, prune)
        for kind in ("tied", "zeros", "equal"):
            # More than one block of the kernel.
            yield largest((37, 61), kind, dtype, 1100)
        for layout in ("rows", "columns", "slice"):
            yield of(11, 24, "tied", dtype, (2, 4), layout)
            yield of(5, 94, "zeros", dtype, (20, 47), layout)
        for counts in ((0, 4), (4, 4), (1, 3), (4, 8), (16, 32)):
            yield of(3, 96, "normal", dtype, counts, "rows")
        yield of(0, 8, "normal", dtype, (1, 2), "rows")
        yield of(3, 0, "normal", dtype, (1, 2), "rows")
        yield of(37, 4, "equal", dtype, (2, 4), "columns")
        # Whole rows, the second longer than a block.
        yield of(4, 67, "zeros", dtype, (33, 67), "rows")
        yield of(2, 1033, "tied", dtype, (517, 1033), "rows")


def admm_step_cases() -> Iterator[Case]:
    def step(r: int, c: int, dtype: torch.dtype, layout: str) -> Case:
        def build(generator: torch.Generator) -> dict[str, Any]:
            names = ("target", "weight", "dual")
            given = {name: laid_out(normal(generator, r, c).to(dtype), layout) for name in names}
            return {**given, "keep": laid_out(torch.rand(r, c, generator=generator) > 0.5, layout)}

        return Case("admm_step", f"{r}x{c}-{layout}", dtype, build, exact=True)

    for dtype in DTYPES:
        for r, c in ((0, 5), (5, 0), (1, 1), (7, 13), (3, 1031)):
            yield step(r, c, dtype, "rows")
        yield step(40, 97, dtype, "slice")
        # More rows than the reference takes at a time.
        yield step(997, 41, dtype, "columns")


def solver_cases() -> list[Case]:
    """Every case of these ops, in a fixed order."""
    cases = [*cross_update_cases(), *descend_cases(), *clip_search_cases()]
    return [*cases, *select_cases(), *admm_step_cases()]
