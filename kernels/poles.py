"""Powers of poles inside Triton kernels, by the rule of `modal.powers`. Imported by kernels alone."""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import interpreter


@triton.jit
def reduced(angle, times):
    """times * angle modulo 2 pi, from -pi to pi, of float64 values: `modal.reduced`.

    The angle is split by its bits, since a fused multiplication and addition would undo a split by arithmetic.
    """
    turns = tl.floor(times * (angle * 0.15915494309189535) + 0.5)
    bits = angle.to(tl.int64, bitcast=True)
    high = ((bits >> 27) << 27).to(tl.float64, bitcast=True)
    low = angle - high
    near = (times * high - turns * 6.283185243606567) - turns * 6.357301884918343e-08
    return near + (times * low - turns * 2.4492935982947064e-16)


@triton.jit
def reduced_to_quarter(angle, times):
    """times * angle as a number of quarter turns and float64 rest of at most pi / 4; see `reduced`."""
    quarters = tl.floor(times * (angle * 0.6366197723675814) + 0.5)
    bits = angle.to(tl.int64, bitcast=True)
    high = ((bits >> 27) << 27).to(tl.float64, bitcast=True)
    low = angle - high
    near = (times * high - quarters * 1.5707963109016418) - quarters * 1.5893254712295857e-08
    return quarters.to(tl.int64), near + (times * low - quarters * 6.123233995736766e-17)


@triton.jit
def power(rate, angle, times, ACC: tl.constexpr):
    """Real and imaginary part of exp(times (rate + i angle)) in ACC; all three are float64, `times` whole numbers.

    float32 has its own sine and cosine: the device's begin with a reduction that is done already, and carry the code
    for arguments that are never there.
    """
    # 0 times minus infinity would be no number.
    size = tl.exp((times * tl.where(times == 0, 0.0, rate)).to(ACC))
    if tl.float64 == ACC:
        phase = reduced(angle, times)
        return size * tl.cos(phase), size * tl.sin(phase)
    quarter, rest = reduced_to_quarter(angle, times)
    x = rest.to(tl.float32)
    y = x * x
    # Taylor's series: the first terms left out are below 2e-9 of the result.
    sine = x - x * y * (1 / 6 - y * (1 / 120 - y * (1 / 5040 - y * (1 / 362880))))
    cosine = 1 - y * (0.5 - y * (1 / 24 - y * (1 / 720 - y * (1 / 40320 - y * (1 / 3628800)))))
    odd = (quarter & 1) != 0
    real, imaginary = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    real = tl.where(((quarter + 1) & 2) != 0, -real, real)
    imaginary = tl.where((quarter & 2) != 0, -imaginary, imaginary)
    return size * real, size * imaginary


@triton.jit
def load_planes(at, k, entries):
    """Both planes of entries k of a channel's contiguous [K, 2] in float64; entries past the last are 0."""
    first = tl.load(at + 2 * k, mask=k < entries, other=0.0).to(tl.float64)
    return first, tl.load(at + 2 * k + 1, mask=k < entries, other=0.0).to(tl.float64)


@triton.jit
def side_by_side(real, imaginary):
    """Two tiles [n, K] as the columns of one [n, 2 K], in turn."""
    return tl.reshape(tl.join(real, imaginary), [real.shape[0], 2 * real.shape[1]])


@triton.jit
def apart(tile):
    """What `side_by_side` joined."""
    return tl.split(tl.reshape(tile, [tile.shape[0], tile.shape[1] // 2, 2]))


def accumulator(dtype: torch.dtype) -> tl.constexpr:
    """The dtype that results of a dtype are computed in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def refused(*tensors: torch.Tensor) -> str | None:
    """Why kernels that compute in float32 cannot take these tensors, or None."""
    if any(t.dtype == torch.float64 for t in tensors) and not interpreter():
        return "float64 is for the interpreter only"
    return None
