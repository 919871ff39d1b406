"""A float tensor in another dtype: every element rounded once, to nearest, ties to even."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewright.passes.errors import BoundError

if TYPE_CHECKING:
    import torch

# Elements that are rounded together: what a piece takes beside the tensors is a few times 4 MiB.
PIECE = 1 << 20


def rounded(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> tuple[torch.Tensor, float, int]:
    """`tensor` in `dtype`; the largest relative error of a value that did not become zero; how many became zero.

    `tensor` and `dtype` are floats of 8 to 64 bits, of any shape. Infinities, NaN and signs of zeros stay what they
    are. Raises BoundError naming the tensor for a value past the largest of `dtype`, which is also an infinity where
    `dtype` has none.
    """
    import torch

    made = torch.empty(tensor.shape, dtype=dtype)
    largest, zeroed = 0.0, 0
    if tensor.numel():
        for old, new in zip(torch.split(tensor.flatten(), PIECE), torch.split(made.flatten(), PIECE), strict=True):
            exact = old if old.dtype == torch.float64 else old.float()
            _refuse_past(exact, dtype, name)
            new.copy_(_sticky(exact) if dtype != torch.float32 else exact)
            back = new.to(exact.dtype)
            lost = (back == 0) & (exact != 0)
            # infinities and zeros, divided by themselves, are NaN, and no error
            error = ((back - exact) / exact).abs_().masked_fill_(lost, 0).nan_to_num_(0)
            largest, zeroed = max(largest, float(error.max())), zeroed + int(lost.sum())
    return made, largest, zeroed


def _refuse_past(exact: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    import torch

    most = torch.finfo(dtype).max
    past = exact.abs() > most
    if dtype not in (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        past &= exact.isfinite()
    if past.any():
        raise BoundError(
            f"tensor `{name}` holds {float(exact[past][0]):.6g}, past the {most:.6g} that {str(dtype)[6:]} reaches",
            hint="leave the tensor as it is with `--keep`, or choose a dtype of a larger range",
        )


def _sticky(exact: torch.Tensor) -> torch.Tensor:
    """float32 that rounds to any narrower dtype as `exact` does: of two neighbours of a float64 the odd one.

    Rounding twice to nearest would move values that the first rounding puts just between two others. Source: S. Boldo
    and G. Melquiond, Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd, 2008.
    """
    import torch

    near = exact.float()
    if exact.dtype == torch.float32:
        return near
    infinity = torch.tensor(float("inf"))
    other = torch.nextafter(near, torch.where(near > exact, -infinity, infinity))
    even = (near.view(torch.int32) & 1) == 0
    return torch.where(even & (near != exact), other, near)
