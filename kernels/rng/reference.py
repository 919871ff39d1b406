"""Philox-4x32-10 in int64 tensors: 32-bit words in the lower half, wrap-around products where two words multiply."""

from __future__ import annotations

import torch

from rewright.kernels.launch import cdiv

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_BLOCKS = 1 << 20

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Ten rounds on four int64 tensors of 32-bit words under a key of two 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product of two words can reach 2^64 and wrap; its bits stay right, and the mask drops copies of the sign.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _WORD) ^ c1 ^ k0,
            second & _WORD,
            ((first >> 32) & _WORD) ^ c3 ^ k1,
            first & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def random_bits(out: torch.Tensor, seed: int, counter: int) -> None:
    """Fill the int32 vector `out`; see the package."""
    count = out.numel()
    key = (seed & _WORD, seed >> 32)
    for start in range(0, cdiv(count, 4), _BLOCKS):
        stop = min(start + _BLOCKS, cdiv(count, 4))
        block = torch.arange(counter + start, counter + stop, dtype=torch.int64, device=out.device)
        nothing = torch.zeros_like(block)
        words = torch.stack(philox((block & _WORD, block >> 32, nothing, nothing), key), dim=1).view(-1)
        # The words above 2^31 become the negative integers with their bits.
        signed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
        piece = out[4 * start : min(4 * stop, count)]
        piece.copy_(signed[: piece.numel()])
