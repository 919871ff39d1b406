"""The peers that ops are timed beside compute what the ops do."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.bench import admm_step, clip_search, descend, harness, select
from tests.kernels.conform import wanted


def test_the_peers_of_the_ops_that_choose_compute_the_same() -> None:
    generator = torch.Generator().manual_seed(4)
    weight, target, dual = torch.randn(3, 24, 37, generator=generator).unbind(0)
    keep = torch.rand(24, 37, generator=generator) > 0.5
    importance = torch.rand(24, generator=generator)
    grid = clip_search.clip_search(
        weight.t(), keep.t(), importance, bits=4, symmetric=True, shares=clip_search.SHARES, stored=torch.bfloat16
    )
    assert torch.equal(clip_search.eager(weight, keep, importance, 4, clip_search.SHARES), grid.scale)

    hessian = torch.randn(60, 24, generator=generator)
    hessian = hessian.t() @ hessian / 60
    given = weight.t(), target.t(), hessian, grid.scale
    codes, value = descend.eager(*given, keep.t(), -8, 7)
    descent = descend.descend(*given, keep=keep.t(), low=-8, high=7)
    assert torch.equal(codes, descent.codes)
    assert torch.equal(value, descent.dequantised)

    mine, theirs = dual.clone(), dual.clone()
    rhs = admm_step.admm_step(target, weight, mine, keep)
    assert torch.allclose(admm_step.eager(target, weight, theirs, keep), rhs, atol=1e-6)
    assert torch.allclose(theirs, mine, atol=1e-6)

    score = torch.rand(8, 24, generator=generator)
    assert torch.equal(select.sorted_out(score, 5, 12), select.keep_of(score, 5, 12))


@pytest.mark.parametrize("op", ["cross_update", "select"])
def test_an_op_is_timed_when_all_its_functions_conform(op: str) -> None:
    functions = harness.FUNCTIONS.get(op, (op,))
    cases = [case for case in wanted("reference", "cpu") if case.op in functions]
    assert harness.gate(op, "reference", "cpu") == len(cases) > 0
    assert all(job.moved > 0 for job in importlib.import_module(f"tests.bench.{op}").jobs("cpu"))
