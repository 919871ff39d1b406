"""Inputs for the ops on powers and sums of poles: shapes with 0, 1 and primes, strided views, poles at 0 and near 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tests.kernels.case import DTYPES, Case, laid_out, normal

WIDE = (torch.float64, torch.float32)
EMPTY = ((0, 3, 5), (2, 0, 7), (2, 3, 0))


def logs_of(generator: torch.Generator, channels: int, entries: int) -> torch.Tensor:
    """Poles of all decays and angles; in the first channel one is 0, in the last one is near 1."""
    decay = -(10.0 ** (-3 * torch.rand(channels, entries, generator=generator, dtype=torch.float64)))
    angle = 3.1 * (2 * torch.rand(channels, entries, generator=generator, dtype=torch.float64) - 1)
    logs = torch.stack((decay, angle), dim=-1)
    if channels and entries:
        logs[-1, 0] = torch.tensor((-1e-6, 1e-5))
        logs[0, -1, 0] = -torch.inf
    return logs


def every_other(values: torch.Tensor) -> torch.Tensor:
    """The same values as a view that skips entries filled with NaN."""
    base = torch.full((*values.shape[:-1], 2 * values.shape[-1] + 1), torch.nan, dtype=values.dtype)
    base[..., 1::2] = values
    return base[..., 1::2]


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _modes(
    generator: torch.Generator, channels: int, entries: int, dtype: torch.dtype, layout: str
) -> dict[str, torch.Tensor]:
    given = {
        "logs": logs_of(generator, channels, entries).to(dtype),
        "residues": normal(generator, channels, entries, 2).to(dtype),
    }
    return {name: every_other(t) for name, t in given.items()} if layout == "slice" else given


def _vandermonde(size: tuple[int, int, int], dtype: torch.dtype, layout: str = "rows", logs: str = "") -> Case:
    channels, entries, length = size

    def build(generator: torch.Generator) -> dict[str, Any]:
        given: dict[str, Any] = _modes(generator, channels, entries, dtype, layout)
        if logs:
            given["logs"] = logs_of(generator, channels, entries)
        return given | {"length": length, "upstream": normal(generator, channels, length).to(dtype)}

    return Case("vandermonde", f"{'x'.join(map(str, size))}-{layout}{logs}", dtype, build)


def vandermonde_cases() -> Iterator[Case]:
    for dtype in WIDE:
        for size in EMPTY if dtype == torch.float64 else ():
            yield _vandermonde(size, dtype)
        # The last has a step more than a tile of the kernel.
        for size in ((1, 1, 1), (1, 9, 131), (1, 2, 4097)):
            yield _vandermonde(size, dtype)
        yield _vandermonde((3, 5, 17), dtype, "slice")
    yield _vandermonde((2, 3, 61), torch.float32, logs="-logs64")


def _values(op: str, size: tuple[int, int, int], dtype: torch.dtype, layout: str = "rows") -> Case:
    channels, entries, length = size

    def build(generator: torch.Generator) -> dict[str, Any]:
        given: dict[str, Any] = _modes(generator, channels, entries, _wider(dtype), layout)
        name = "target" if op == "modal_fit_step" else "values"
        given[name] = laid_out(normal(generator, channels, length).to(dtype), layout)
        if op == "vandermonde_adjoint":
            del given["residues"]
        return given

    return Case(op, f"{'x'.join(map(str, size))}-{layout}", dtype, build)


def values_cases() -> Iterator[Case]:
    for op in ("vandermonde_adjoint", "modal_fit_step"):
        for dtype in DTYPES:
            if dtype == torch.float64:
                for size in (*EMPTY, (1, 1, 1)):
                    yield _values(op, size, dtype)
            if dtype == torch.float32:
                yield _values(op, (1, 2, 2049), dtype)
            yield _values(op, (1, 9, 131), dtype)
            yield _values(op, (2, 5, 17), dtype, "slice")


def _gram(size: tuple[int, int, int], kind: str) -> Case:
    channels, entries, length = size

    def build(generator: torch.Generator) -> dict[str, Any]:
        logs = logs_of(generator, channels, entries)
        span = max(length, 1)
        if kind == "near":
            logs[:, 1:] = torch.tensor((0.0, 0.7)) + normal(generator, channels, entries - 1, 2) / (2 * span)
            logs[:, 1:, 0] = -logs[:, 1:, 0].abs()
        if kind == "circle":
            logs[..., 0] *= 1e-9
            logs[:, :3, 1] = torch.tensor((0.0, torch.pi, torch.pi / 2))
        return {"logs": every_other(logs), "length": length}

    return Case("vp_gram", f"{'x'.join(map(str, size))}-{kind}", torch.float64, build)


def gram_cases() -> Iterator[Case]:
    for size in ((0, 2, 5), (2, 0, 5), (1, 2, 0), (1, 1, 1), (1, 9, 8191)):
        yield _gram(size, "spread")
    yield _gram((1, 5, 997), "near")
    yield _gram((1, 5, 127), "circle")


def _prefill(size: tuple[int, int, int, int], dtype: torch.dtype, state: bool = True, layout: str = "rows") -> Case:
    batch, channels, entries, times = size

    def build(generator: torch.Generator) -> dict[str, Any]:
        wide = _wider(dtype)
        u = normal(generator, batch, channels, times).to(dtype)
        if layout == "transposed":
            u = u.transpose(1, 2).contiguous().transpose(1, 2)
        given: dict[str, Any] = _modes(generator, channels, entries, wide, "rows")
        given |= {"u": every_other(u) if layout == "slice" else u, "h0": normal(generator, channels).to(wide)}
        return given | {"state": normal(generator, batch, channels, entries, 2).to(wide) if state else None}

    label = f"{'x'.join(map(str, size))}-{layout}{'-state' if state else ''}"
    return Case("modal_chunk_prefill", label, dtype, build)


def prefill_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        if dtype == torch.float64:
            for size in ((0, 2, 3, 5), (2, 0, 3, 5), (1, 2, 0, 5), (1, 2, 3, 0)):
                yield _prefill(size, dtype)
        if dtype == torch.float32:
            yield _prefill((1, 1, 1, 1), dtype)
            yield _prefill((1, 1, 2, 512), dtype)
            yield _prefill((1, 1, 3, 64), dtype, state=False, layout="slice")
        yield _prefill((2, 1, 3, 37), dtype, state=False, layout="transposed")
        # A whole tile, a whole chunk and a part of one.
        yield _prefill((1, 1, 9, 547), dtype)


def _step(size: tuple[int, int, int, int], dtype: torch.dtype, bias: bool = True, layout: str = "rows") -> Case:
    batch, width, entries, taps = size

    def build(generator: torch.Generator) -> dict[str, Any]:
        wide = _wider(dtype)
        logs = logs_of(generator, width, entries)
        radius = logs[..., 0].exp()
        given = {
            "z": normal(generator, batch, 3 * width),
            "recent": normal(generator, batch, 3 * width, taps - 1),
            "taps": normal(generator, 3 * width, taps),
            "bias": normal(generator, 3 * width) if bias else None,
        }
        given = {name: t if t is None else t.to(dtype) for name, t in given.items()}
        if layout == "slice":
            given = {name: t if t is None else every_other(t) for name, t in given.items()}
        poles = torch.stack((radius * logs[..., 1].cos(), radius * logs[..., 1].sin()), dim=-1)
        given |= {"poles": poles.to(wide), "residues": normal(generator, width, entries, 2).to(wide)}
        given |= {"state": normal(generator, batch, width, entries, 2).to(wide)}
        return given | {"h0": normal(generator, width).to(wide)}

    label = f"{'x'.join(map(str, size))}-{layout}{'-bias' if bias else ''}"
    return Case("modal_step", label, dtype, build)


def step_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for size in ((0, 2, 3, 3), (2, 0, 3, 3), (2, 3, 0, 2), (1, 1, 1, 1)):
            if dtype == torch.float64:
                yield _step(size, dtype)
        # More channels than a program takes.
        yield _step((1, 67, 5, 3), dtype)
        yield _step((3, 5, 9, 4), dtype, bias=False, layout="slice")


def _filter(size: tuple[int, int, int, int], layers: int, dtype: torch.dtype, layout: str = "rows") -> Case:
    length, inputs, width, channels = size

    def build(generator: torch.Generator) -> dict[str, Any]:
        shapes = [(width, inputs), *[(width, width)] * (layers - 1), (channels, width)]
        return {
            "features": laid_out(normal(generator, length, inputs).to(dtype), layout),
            "times": torch.linspace(0, 1, length, dtype=torch.float64).to(dtype),
            "weights": [(normal(generator, *shape) / max(shape[1], 1) ** 0.5).to(dtype) for shape in shapes],
            "biases": [normal(generator, width).to(dtype) for _ in range(layers)],
            # The first layer's sines have arguments of some tens.
            "frequencies": [(normal(generator, width) * (20.0 if i == 0 else 2.0)).to(dtype) for i in range(layers)],
            "deltas": (5 * normal(generator, channels)).to(dtype),
            "shift": 0.0625,
        }

    return Case("hyena_filter", f"{'x'.join(map(str, size))}-{layers}layers-{layout}", dtype, build)


def filter_cases() -> Iterator[Case]:
    for dtype in WIDE:
        for size in ((0, 3, 4, 2), (3, 2, 4, 0), (1, 1, 1, 1)) if dtype == torch.float64 else ():
            yield _filter(size, 1, dtype)
        yield _filter((23, 33, 64, 19), 3, dtype)
        yield _filter((19, 5, 7, 11), 2, dtype, "slice")


def _rational(size: tuple[int, int, int], dtype: torch.dtype, layout: str = "rows") -> Case:
    channels, entries, points = size

    def build(generator: torch.Generator) -> dict[str, Any]:
        angle = 6.3 * torch.rand(points, generator=generator, dtype=torch.float64)
        given = {
            "points": torch.stack((angle.cos(), angle.sin()), dim=-1),
            "poles": 0.7 * normal(generator, channels, entries, 2),
            "residues": normal(generator, channels, entries, 2),
            "direct": normal(generator, channels, 2),
            "upstream": normal(generator, channels, points, 2),
        }
        if channels and entries and points:
            # An unused entry, and a point where it has its pole.
            given["poles"][0, 0] = given["residues"][0, 0] = given["points"][0] = 0
        given = {name: t.to(dtype) for name, t in given.items()}
        return {name: every_other(t) for name, t in given.items()} if layout == "slice" else given

    return Case("rational", f"{'x'.join(map(str, size))}-{layout}", dtype, build)


def rational_cases() -> Iterator[Case]:
    for dtype in WIDE:
        for size in EMPTY if dtype == torch.float64 else ():
            yield _rational(size, dtype)
        # The last has more points than a program takes.
        for size in ((1, 1, 1), (1, 3, 263)):
            yield _rational(size, dtype)
        yield _rational((2, 5, 17), dtype, "slice")


def modal_cases() -> list[Case]:
    """Every case of these ops, in a fixed order."""
    return [
        *vandermonde_cases(),
        *values_cases(),
        *gram_cases(),
        *prefill_cases(),
        *step_cases(),
        *filter_cases(),
        *rational_cases(),
    ]
