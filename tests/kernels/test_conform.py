"""Every op, dtype and backend against the definition in float64; `conform.py` has the bound and the reasons."""

from __future__ import annotations

import pytest
import torch

from rewright.kernels.joint_sweep import joint_sweep
from tests.kernels.cases import Case, all_cases
from tests.kernels.conform import judge, replay, wanted
from tests.kernels.worker import answer


def _jobs() -> list[object]:
    jobs = [("reference", case) for case in all_cases()]
    jobs += [("interpreter", case) for case in wanted("triton", "cpu")]
    if torch.cuda.is_available():
        jobs += [("gpu", case) for case in wanted("triton", "cuda")]
    return [pytest.param(backend, case, id=f"{backend}-{case.id}") for backend, case in jobs]


@pytest.mark.parametrize(("backend", "case"), _jobs())
def test_conforms(backend: str, case: Case) -> None:
    if backend == "interpreter":
        found = answer("tests.kernels.conform", case.op, "--kernels", "triton", "--device", "cpu", interpret=True)
        ok, _, detail = found[case.id]
    elif backend == "gpu":
        ok, _, detail = judge(case, "triton", "cuda")
    else:
        ok, _, detail = judge(case, "reference")
    assert ok, detail


def test_every_op_has_cases_in_every_dtype_it_takes() -> None:
    seen = {(case.op, case.dtype) for case in wanted("triton", "cpu")}
    floating = (torch.float64, torch.float32, torch.float16)
    assert {(op, d) for op in ("hessian_update", "joint_sweep") for d in floating} <= seen
    assert {("pack", torch.int8), ("unpack", torch.int8), ("rng", torch.int32)} <= seen


def test_the_judge_sees_a_wrong_code_and_a_lost_error() -> None:
    """A judge that accepts everything would pass all of the above."""
    case = next(c for c in all_cases() if c.id == "joint_sweep-float32-37x32-asymmetric-columns")
    arguments = case.make()
    sweep = joint_sweep(**arguments)
    assert replay(arguments, sweep.codes).excess.max() < 1e-4
    wrong = sweep.codes.clone()
    kept = arguments["keep"].nonzero()[0]
    wrong[tuple(kept)] += 2 if wrong[tuple(kept)] < 6 else -2
    assert replay(arguments, wrong).excess.max() > 0.9
    assert (replay(arguments, wrong).error - sweep.error).abs().max() > 1e-3
