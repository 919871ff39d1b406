"""What `joint_sweep` and `hessian_update` promise besides numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rewright.kernels.hessian_update import hessian_update
from rewright.kernels.joint_sweep import joint_sweep
from tests.kernels.cases import factor_of


def _block(r: int, width: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(r, width, generator=generator, dtype=torch.float64)
    return {
        "weight": weight.to(dtype),
        "factor": factor_of(generator, width).to(dtype),
        "scale": (weight.abs().amax(dim=1) / 7.5).to(dtype),
        "keep": torch.rand(r, width, generator=generator) > 0.5,
    }


def test_pruning_alone_is_the_optimal_update() -> None:
    """Pruned in order, OBS with earlier columns fixed: the kept ones solve the least squares of what is left."""
    given = _block(1, 6)
    keep = torch.tensor([[False, True, True, True, True, True]])
    sweep = joint_sweep(given["weight"], given["factor"], keep=keep, low=0, high=0)
    H = torch.linalg.inv(given["factor"].t() @ given["factor"])
    w = given["weight"][0]
    shift = torch.linalg.solve(H[1:, 1:], H[1:, 0] * w[0])
    assert torch.allclose(sweep.dequantised[0, 1:], w[1:] + shift)
    rise = sweep.dequantised[0] - w
    assert torch.allclose(sweep.loss[0], rise @ H @ rise / 2)


def test_blocks_joined_by_the_callers_update_are_one_sweep() -> None:
    given = _block(40, 48)
    whole = joint_sweep(**given, low=-8, high=7)
    weight, factor = given["weight"].clone(), given["factor"]
    for start, stop in ((0, 32), (32, 48)):
        part = joint_sweep(
            weight[:, start:stop],
            factor[start:stop, start:stop],
            given["scale"],
            keep=given["keep"][:, start:stop],
            low=-8,
            high=7,
        )
        weight[:, stop:] -= part.error @ factor[start:stop, stop:]
        assert torch.equal(part.codes, whole.codes[:, start:stop])
        assert torch.allclose(part.error, whole.error[:, start:stop])


def test_the_weight_is_left_alone_and_only_the_upper_triangle_is_read() -> None:
    given = _block(9, 11)
    before = given["weight"].clone()
    plain = joint_sweep(**given, low=-8, high=7)
    assert torch.equal(given["weight"], before)
    given["factor"] = given["factor"] + torch.full_like(given["factor"], torch.nan).tril(-1).nan_to_num(5.0)
    assert torch.equal(joint_sweep(**given, low=-8, high=7).error, plain.error)


@pytest.mark.parametrize(
    "change",
    [
        {"weight": torch.zeros(9, 11, dtype=torch.int32)},
        {"factor": torch.eye(10)},
        {"scale": torch.ones(8)},
        {"zero": torch.ones(9, 1)},
        {"keep": torch.ones(9, 11)},
        {"low": 0, "high": 255},
    ],
)
def test_other_inputs_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must"):
        joint_sweep(**{**_block(9, 11), "low": -8, "high": 7, **change})


def test_hessians_of_wrong_shape_or_dtype_are_refused() -> None:
    for H, X in (
        (torch.zeros(3, 4), torch.zeros(2, 3)),
        (torch.zeros(3, 3), torch.zeros(2, 4)),
        (torch.zeros(3, 3, dtype=torch.float16), torch.zeros(2, 3)),
        (torch.zeros(3, 3), torch.zeros(2, 3, dtype=torch.int32)),
    ):
        with pytest.raises(ValueError, match="must be"):
            hessian_update(H, X, 1.0)


def test_a_hessian_in_a_larger_tensor_leaves_its_neighbours_alone() -> None:
    base = torch.full((7, 9), torch.nan)
    view = base[1:6, 2:7]
    view.zero_()
    hessian_update(view, torch.ones(3, 5), 0.5)
    assert torch.equal(view, torch.full((5, 5), 1.5))
    assert base.isnan().sum() == 63 - 25
