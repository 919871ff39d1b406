"""`vp_gram` on a GPU, in float64: a program takes the pairs of some poles with all others of a channel."""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import cdiv, device_guard
from rewright.kernels.poles import load_planes, reduced
from rewright.kernels.vp_gram.series import TERMS, coefficients

# Poles of a side of a tile.
BLOCK = 8
WARPS = 4


@triton.jit
def expm1(x):
    """exp(x) - 1 without a loss of digits near 0."""
    series = tl.full(x.shape, 1.0, tl.float64)
    for n in tl.static_range(14, 1, -1):
        series = 1.0 + series * (x * (1.0 / n))
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def less_one(rate, angle):
    """Both planes of exp(rate + i angle) - 1, for rate at most 0."""
    half = tl.sin(angle * 0.5)
    return expm1(rate) * tl.cos(angle) - 2.0 * half * half, tl.exp(rate) * tl.sin(angle)


@triton.jit
def times(a, b, c, d):
    """(a + i b) (c + i d)."""
    return a * c - b * d, a * d + b * c


@triton.jit
def sums(rate, angle, whole, length, factors_ptr, TERMS: tl.constexpr):
    """Both planes of the sums of q^t, t q^t and t^2 q^t, q = exp(rate + i angle); see the reference for the steps."""
    angle = reduced(angle, tl.full(angle.shape, 1.0, tl.float64))
    far = length * angle
    whole = tl.where(tl.abs(far) < 3.0, far, whole)
    power = length * rate
    near = tl.sqrt(power * power + far * far) < 1.0
    base = tl.where(near, 1.0, angle)
    down, fall = less_one(rate, base)
    size = 1.0 / (down * down + fall * fall)
    down, fall = down * size, -fall * size
    right, up = less_one(power, whole)
    a, b = times(right, up, down, fall)
    size = tl.exp(rate)
    q, p = size * tl.cos(base), size * tl.sin(base)
    size = tl.exp(power)
    last, tail = size * tl.cos(whole), size * tl.sin(whole)
    right, up = times(a, b, q, p)
    c, d = times(length * last - right, length * tail - up, down, fall)
    right, up = times(2.0 * c + a, 2.0 * d + b, q, p)
    e, f = times(length * (length * last) - right, length * (length * tail) - up, down, fall)
    # Where q is too near 1 for these quotients, a series in log q^L.
    power, far = tl.where(near, power, 0.0), tl.where(near, far, 0.0)
    first = tl.zeros_like(far)
    second, third, fourth, fifth, sixth = first, first, first, first, first
    for step in range(TERMS + 1):
        term = TERMS - step
        over = 1.0 / tl.maximum(term, 1).to(tl.float64)
        right, up = times(power, far, first, second)
        first, second = (tl.load(factors_ptr + term) + right) * over, up * over
        right, up = times(power, far, third, fourth)
        third, fourth = (tl.load(factors_ptr + term + 1) + right) * over, up * over
        right, up = times(power, far, fifth, sixth)
        fifth, sixth = (tl.load(factors_ptr + term + 2) + right) * over, up * over
    square = length * length
    cube = square * length
    return (
        tl.where(near, length * first, a),
        tl.where(near, length * second, b),
        tl.where(near, square * third, c),
        tl.where(near, square * fourth, d),
        tl.where(near, cube * fifth, e),
        tl.where(near, cube * sixth, f),
    )


@triton.jit
def store_blocks(out_at, i, j, entries, real, imaginary):
    """The four blocks of a matrix from the sums for p_i p_j and p_i conj(p_j)."""
    inside = (i < entries) & (j < entries)
    row = 2 * entries
    plus, minus = tl.split(real)
    tl.store(out_at + i * row + j, (plus + minus) * 0.5, mask=inside)
    tl.store(out_at + (i + entries) * row + j + entries, (minus - plus) * 0.5, mask=inside)
    plus, minus = tl.split(imaginary)
    tl.store(out_at + i * row + j + entries, (minus - plus) * 0.5, mask=inside)
    tl.store(out_at + (j + entries) * row + i, (minus - plus) * 0.5, mask=inside)


@triton.jit
def vp_gram_kernel(
    logs_ptr, factors_ptr, out_ptr, channels, entries, span, TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    length = tl.cast(span, tl.float64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rate_i, angle_i = load_planes(logs_ptr + channel * entries * 2, i, entries)
    whole_i = reduced(angle_i, tl.zeros_like(angle_i) + length)
    size = tl.cast(4 * entries, tl.int64) * entries
    out_at = out_ptr + channel * size
    for start in range(0, entries, BLOCK):
        j = start + tl.arange(0, BLOCK)
        rate_j, angle_j = load_planes(logs_ptr + channel * entries * 2, j, entries)
        whole_j = reduced(angle_j, tl.zeros_like(angle_j) + length)
        rate = rate_i[:, None] + rate_j[None, :]
        # Of p_i p_j, and of p_i conj(p_j).
        angle = tl.join(angle_i[:, None] + angle_j[None, :], angle_i[:, None] - angle_j[None, :])
        whole = tl.join(whole_i[:, None] + whole_j[None, :], whole_i[:, None] - whole_j[None, :])
        a, b, c, d, e, f = sums(tl.join(rate, rate), angle, whole, length, factors_ptr, TERMS)
        store_blocks(out_at, i[:, None], j[None, :], entries, a, b)
        store_blocks(out_at + channels * size, i[:, None], j[None, :], entries, c, d)
        store_blocks(out_at + 2 * channels * size, i[:, None], j[None, :], entries, e, f)


def vp_gram(logs: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gram`, `gram_t` and `gram_tt` [C, 2K, 2K]; see the package for shapes."""
    channels, entries, _ = logs.shape
    found = logs.new_zeros((3, channels, 2 * entries, 2 * entries))
    if found.numel() > 0 and length > 0:
        factors = torch.tensor(coefficients(length), dtype=torch.float64, device=logs.device)
        with device_guard(logs):
            vp_gram_kernel[(channels, cdiv(entries, BLOCK))](
                logs.contiguous(),
                factors,
                found,
                channels,
                entries,
                length,
                TERMS=TERMS,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
    return found[0], found[1], found[2]
