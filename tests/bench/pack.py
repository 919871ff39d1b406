"""`pack` and `unpack` beside the helpers of compressed-tensors."""

from __future__ import annotations

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from rewright.kernels.pack import pack, unpack
from tests.bench.harness import Job


def jobs(device: str) -> list[Job]:
    """A matrix of 3, 4 and 8-bit codes, both ways."""
    side = 8192 if device == "cuda" else 2048
    return [job for bits in (3, 4, 8) for job in _both(side, bits, device)]


def _both(side: int, bits: int, device: str) -> list[Job]:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (side, side), device=device).to(torch.int8)
    packed = pack(codes, bits)
    shape = f"{side}x{side} {bits} bits"
    return [
        Job(
            label=f"pack {shape}",
            call=lambda: pack(codes, bits),
            moved=codes.nbytes + packed.nbytes,
            flops=0,
            bound="copy",
            dtype=torch.int8,
            peer_name="compressed_tensors pack_to_int32",
            peer=lambda: pack_to_int32(codes, bits),
        ),
        Job(
            label=f"unpack {shape}",
            call=lambda: unpack(packed, bits, side),
            moved=codes.nbytes + packed.nbytes,
            flops=0,
            bound="copy",
            dtype=torch.int8,
            peer_name="compressed_tensors unpack_from_int32",
            peer=lambda: unpack_from_int32(packed, bits, codes.shape),
        ),
    ]
