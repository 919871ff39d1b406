"""What a matrix of packed codes is held as while a model runs: as its file has it, or in torch's int4 form.

A form is never expanded for good. It gives its weights in the dtype of the activations, bit for bit what plain
transformers decodes, or multiplies by the codes where that is faster.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from rewright.kernels.bitmask import unpack_bitmask
from rewright.kernels.bitmask_w4_gemv import bitmask_w4_gemv
from rewright.kernels.operands import WIDTHS
from rewright.kernels.pack import unpack
from rewright.kernels.w4a16_gemm import w4a16_gemm
from rewright.kernels.w4a16_gemv import MOST_ROWS, w4a16_gemv
from rewright.passes.models import int4pack

# Output rows of a matrix in the int4 form that are decoded together, in units of its blocks.
WIDE = 2048


class Scratch:
    """Memory for one decoded matrix at a time, used again by the next: fresh pages cost more than decoding does."""

    def __init__(self) -> None:
        self._held = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Scratch:
        return self

    def take(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of any values, on the CPU: this thread's, until the next is taken for the same use."""
        count = math.prod(shape)
        held: torch.Tensor | None = getattr(self._held, use, None)
        if held is None or held.numel() < count * dtype.itemsize:
            held = None
            setattr(self._held, use, None)
            with torch.inference_mode(False):
                held = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
            setattr(self._held, use, held)
        return held[: count * dtype.itemsize].view(dtype).view(shape)

    def pairs(self, groups: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One memory seen as int32 (groups, rows) and as bfloat16 (groups, rows, 2)."""
        known: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = self._held.__dict__.setdefault("pairs", {})
        found = known.get((groups, rows))
        if found is None:
            with torch.inference_mode(False):
                words = torch.empty(groups, rows, dtype=torch.int32)
            found = known[groups, rows] = words, words.view(torch.bfloat16).view(groups, rows, 2)
        return found


class Arena:
    """One stretch of memory for what many matrices are held as: in pieces of its own each would leave gaps behind."""

    ALIGN = 64

    def __init__(self, nbytes: int) -> None:
        self._room = torch.empty(nbytes, dtype=torch.uint8)
        self._used = 0

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a CPU tensor in the arena; the tensor itself where there is no room."""
        start, stop = self._used, self._used + tensor.nbytes
        if stop > len(self._room):
            return tensor
        self._used = -(-stop // self.ALIGN) * self.ALIGN
        return self._room[start:stop].view(tensor.dtype).view(tensor.shape).copy_(tensor)


class Form(nn.Module, ABC):
    """A (rows, columns) matrix of codes, each times the scale of its row and group of columns."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape

    @abstractmethod
    def decode(self, dtype: torch.dtype, scratch: Scratch | None) -> torch.Tensor:
        """The weights (rows, columns) in `dtype`; in the scratch memory where one is given, of any strides."""

    def multiply(self, rows: torch.Tensor, bias: torch.Tensor | None, *, learns: bool) -> torch.Tensor | None:
        """`rows` (m, columns) by the matrix, and the bias, from the codes: (m, rows); None where decoding serves.

        `learns` says that a gradient is to flow back to `rows`.
        """
        return None

    def settle(self, arena: Arena) -> None:
        """Move into an arena."""
        for leaf, tensor in self._buffers.items():
            if tensor is not None:
                self._buffers[leaf] = arena.keep(tensor)


class Stored(Form):
    """As a file holds it: `scale` (rows, groups) in its stored dtype, `zero` int8 (rows, groups) or None."""

    scale: torch.Tensor
    zero: torch.Tensor | None

    def __init__(self, shape: tuple[int, int], bits: int, scale: torch.Tensor, zero: torch.Tensor | None) -> None:
        super().__init__(shape)
        self.bits = bits
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    @abstractmethod
    def codes(self, start: int, stop: int) -> torch.Tensor:
        """Codes of rows [start, stop), int8 (stop - start, columns)."""

    def decode(self, dtype: torch.dtype, scratch: Scratch | None) -> torch.Tensor:
        weight = take(scratch, "weight", self.shape, dtype, self.scale.device)
        scale = self.scale.to(dtype)
        step = max(1, int4pack.BLOCK // self.shape[1])
        for start in range(0, self.shape[0], step):
            stop = min(self.shape[0], start + step)
            zero = None if self.zero is None else self.zero[start:stop, :, None]
            grouped = (stop - start, scale.shape[1], -1)
            codes, part = self.codes(start, stop).view(grouped), weight[start:stop].view(grouped)
            _spread(codes, scale[start:stop, :, None], zero, part, scratch)
        return weight


class Stream(Stored):
    """Codes of 2, 3, 4 or 8 bits as a `pack-quantized` file has them: `words` int32 (rows, words)."""

    words: torch.Tensor

    def __init__(
        self, words: torch.Tensor, bits: int, shape: tuple[int, int], scale: torch.Tensor, zero: torch.Tensor | None
    ) -> None:
        super().__init__(shape, bits, scale, zero)
        self.register_buffer("words", words)

    def codes(self, start: int, stop: int) -> torch.Tensor:
        return unpack(self.words[start:stop], self.bits, self.shape[1])

    def multiply(self, rows: torch.Tensor, bias: torch.Tensor | None, *, learns: bool) -> torch.Tensor | None:
        if self.bits not in WIDTHS or self.shape[1] * self.bits % 32 or not (learns or _on_gpu(rows)):
            return None
        if learns or len(rows) > MOST_ROWS:
            return w4a16_gemm(rows, self.words, self.scale, self.zero, bias, bits=self.bits)
        return w4a16_gemv(rows, self.words, self.scale, self.zero, bias, bits=self.bits)


class Bitmask(Stored):
    """Codes of 4 bits, and which of a group's columns they stand at, as a `bitmask-w4` file has them.

    `mask` uint8 (rows, groups, group / 8) and `values` uint8 (rows, groups, kept / 2).
    """

    mask: torch.Tensor
    values: torch.Tensor

    def __init__(self, mask: torch.Tensor, values: torch.Tensor, shape: tuple[int, int], scale: torch.Tensor) -> None:
        super().__init__(shape, 4, scale, None)
        self.register_buffer("mask", mask)
        self.register_buffer("values", values)

    def codes(self, start: int, stop: int) -> torch.Tensor:
        return unpack_bitmask(self.mask[start:stop], self.values[start:stop])

    def multiply(self, rows: torch.Tensor, bias: torch.Tensor | None, *, learns: bool) -> torch.Tensor | None:
        if learns or len(rows) > MOST_ROWS or not _on_gpu(rows):
            return None
        return bitmask_w4_gemv(rows, self.mask, self.values, self.scale, bias)


class Int4(Form):
    """4-bit codes in the form of torch's product on a CPU, for bfloat16 activations; takes the memory of its source.

    `scale` bfloat16 and `zero` int8 are (groups, rows). What the product reads, a scale and a zero a row and group of
    its own sizes, is made from them for each product: it would take twice what the file's scales take.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None

    def __init__(self, source: Stream, group: int, scratch: Scratch) -> None:
        super().__init__(source.shape)
        self.group, self.scratch = group, scratch
        # as many bytes a row as the file has
        self.register_buffer("packed", int4pack.pack(source.codes, source.words.view(torch.uint8)))
        self.register_buffer("scale", source.scale.to(torch.bfloat16).t().contiguous())
        self.register_buffer("zero", None if source.zero is None else source.zero.t().contiguous())

    def decode(self, dtype: torch.dtype, scratch: Scratch | None) -> torch.Tensor:
        rows, columns = self.shape
        weight = take(scratch, "weight", (columns, rows), dtype, self.packed.device)
        share = self.shape[1] // len(self.scale) // self.group
        scale = _repeat(self.scale.to(dtype), share)
        zero = None if self.zero is None else _repeat(self.zero, share)
        # stretches so wide that what is written of each column is more than a few lines of cache
        for start in range(0, rows, WIDE):
            stop = min(rows, start + WIDE)
            step = max(1, int4pack.BLOCK // (self.group * (stop - start)))
            for first in range(0, len(scale), step):
                last = min(len(scale), first + step)
                grouped, place = (
                    (last - first, self.group, stop - start),
                    (slice(first, last), None, slice(start, stop)),
                )
                span = first * self.group, last * self.group
                codes = take(scratch, "codes", (span[1] - span[0], stop - start), torch.int8, self.packed.device)
                int4pack.unpack(self.packed, (start, stop), span, codes)
                part = weight[slice(*span), start:stop].view(grouped)
                _spread(codes.view(grouped), scale[place], None if zero is None else zero[place], part, scratch)
        return weight.t()

    def multiply(self, rows: torch.Tensor, bias: torch.Tensor | None, *, learns: bool) -> torch.Tensor | None:
        if learns or rows.dtype != torch.bfloat16 or len(rows) > int4pack.MOST_ROWS:
            return None
        groups = self.shape[1] // self.group
        words, pairs = self.scratch.pairs(groups, self.shape[0])
        share = groups // len(self.scale)
        scale = _repeat(self.scale.view(torch.uint16), share)
        zero = None if self.zero is None else _repeat(self.zero * -self.scale, share)
        # a scale in the low half of a word is a scale and a zero of 0
        words.copy_(scale)
        if zero is not None:
            pairs[..., 1].copy_(zero)
        product = int4pack.multiply(rows.contiguous(), self.packed, self.group, pairs)
        return product if bias is None else product + bias


def _on_gpu(rows: torch.Tensor) -> bool:
    """Whether the products by packed codes are at their best: float32 has the decoded weight's bits instead."""
    return rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16)


def _repeat(tensor: torch.Tensor, share: int) -> torch.Tensor:
    """Each row so many times."""
    return tensor if share == 1 else tensor.repeat_interleave(share, dim=0)


def take(
    scratch: Scratch | None, use: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Memory of any values: of the scratch where there is one, and on a CPU."""
    if scratch is None or device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return scratch.take(use, shape, dtype)


def _spread(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, out: torch.Tensor, scratch: Scratch | None
) -> None:
    """(codes - zero) * scale into `out`, in whose dtype the scales are; all of three axes, one of them a group's.

    In float32 the difference and the product are exact for 16-bit scales, so that they are rounded once, to what
    arithmetic in a 16-bit dtype gives.
    """
    wide = torch.float32 if out.dtype in (torch.bfloat16, torch.float16) else out.dtype
    exact = out if wide == out.dtype else take(scratch, "exact", tuple(out.shape), wide, out.device)
    exact.copy_(codes)
    if zero is not None:
        exact -= zero
    exact *= scale
    if exact is not out:
        out.copy_(exact)
