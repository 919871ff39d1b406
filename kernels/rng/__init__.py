"""Random numbers from one counter-based generator, equal bit for bit in both implementations.

Philox-4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011): a keyed bijection of a 128-bit
counter. There is no state: block number `counter + i // 4` under the key `seed` gives element i in its lane i mod 4,
so any slice can be drawn on its own, in any order, on any device.
"""

from __future__ import annotations

import torch

from rewright.kernels import dispatch
from rewright.kernels.rng import reference

__all__ = ["random_bits", "uniform"]


def random_bits(count: int, *, seed: int, counter: int = 0, device: torch.device | str | None = None) -> torch.Tensor:
    """(count,) int32, every bit pattern equally likely.

    seed     the 64-bit key, 0 <= seed < 2^64
    counter  number of the first block of four, 0 <= counter < 2^63; the draw uses ceil(count / 4) blocks

    Raises ValueError outside these ranges, `KernelError` when Triton was asked for and cannot run.
    """
    if count < 0 or not 0 <= seed < 1 << 64 or not 0 <= counter < (1 << 63) - count:
        raise ValueError(f"count {count}, seed {seed} or counter {counter} is out of range")
    out = torch.empty(count, dtype=torch.int32, device=device)
    if dispatch.pick("rng", (out,), _supports):
        from rewright.kernels.rng import triton

        triton.random_bits(out, seed, counter)
    else:
        reference.random_bits(out, seed, counter)
    return out


def uniform(count: int, *, seed: int, counter: int = 0, device: torch.device | str | None = None) -> torch.Tensor:
    """(count,) float32 in [0, 1): the upper 24 of each element's `random_bits`, times 2^-24, so exact.

    Arguments and errors are those of `random_bits`.
    """
    bits = random_bits(count, seed=seed, counter=counter, device=device)
    return ((bits >> 8) & 0xFFFFFF).to(torch.float32).mul_(2.0**-24)


def _supports() -> str | None:
    return None
