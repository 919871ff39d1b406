"""A linear layer that runs on a matrix of packed codes without having it expanded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rewright.passes.models import int4pack
from rewright.passes.models.packed_forms import Arena, Form, Int4, Scratch, Stored, Stream


class PackedLinear(nn.Module):
    """What `nn.Linear` is, with a weight of packed codes; made empty, and filled.

    On a CPU its outputs are bit for bit those of the decoded weight wherever that is decoded, one matrix at a time: in
    float32 and float16, and for many rows in bfloat16. For few rows of bfloat16 4-bit codes are multiplied as they are,
    with sums in float32, which is nearer to the exact product than bfloat16 weights are. A GPU multiplies by the codes.
    """

    bias: nn.Parameter | None

    def __init__(self, like: nn.Linear, scratch: Scratch) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scratch = like.in_features, like.out_features, scratch
        self.register_parameter("bias", like.bias)
        self.form: Form | None = None
        self.dtype: torch.dtype | None = None

    def fill(self, matrix: Stored, dtype: torch.dtype, arena: Arena | None = None) -> None:
        """Run on this matrix, whose memory is taken; `dtype`, of the activations to come, settles what it is held as.

        With an arena it moves there.
        """
        group = None
        if dtype == torch.bfloat16 and matrix.bits == 4 and matrix.scale.device.type == "cpu":
            group = int4pack.group_for(*matrix.shape, matrix.shape[1] // matrix.scale.shape[1])
        self.form = Int4(matrix, group, self.scratch) if isinstance(matrix, Stream) and group is not None else matrix
        if arena is not None:
            self.form.settle(arena)
        self.dtype = dtype

    def clear(self) -> None:
        """Be empty again."""
        self.form = None

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight (out_features, in_features), in memory of its own."""
        assert self.form is not None, "a weight is placed before it is asked for"
        assert self.dtype is not None
        return self.form.decode(self.dtype, None)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`inputs` (..., in_features) to (..., out_features)."""
        assert self.form is not None, "a weight is placed before a layer runs"
        learns = inputs.requires_grad and torch.is_grad_enabled()
        outputs = self.form.multiply(inputs.reshape(-1, self.in_features), self.bias, learns=learns)
        if outputs is not None:
            return outputs.view(*inputs.shape[:-1], self.out_features)
        if learns:
            learnt: torch.Tensor = _Decoded.apply(inputs, self.bias, self.form, self.scratch)  # type: ignore[no-untyped-call]  # torch's
            return learnt
        return functional.linear(inputs, self.form.decode(inputs.dtype, self.scratch), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Decoded(torch.autograd.Function):
    """A product by a matrix that is decoded for it, and again for its gradient, so that none is kept in between."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, bias: torch.Tensor | None, form: Form, scratch: Scratch
    ) -> torch.Tensor:
        ctx.form, ctx.scratch, ctx.dtype = form, scratch, inputs.dtype
        return functional.linear(inputs, form.decode(inputs.dtype, scratch), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found = bias = None
        if ctx.needs_input_grad[0]:
            found = gradient @ ctx.form.decode(ctx.dtype, ctx.scratch)
        if ctx.needs_input_grad[1]:
            bias = gradient.flatten(0, -2).sum(dim=0)
        return found, bias, None, None
