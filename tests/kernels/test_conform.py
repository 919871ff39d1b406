"""Every op, dtype and backend against the definition in float64; `conform.py` has the bound and the reasons."""

from __future__ import annotations

import pytest
import torch

from rewright.kernels.clip_search import clip_search
from rewright.kernels.descend import descend
from rewright.kernels.joint_sweep import joint_sweep
from tests.kernels.case import Case
from tests.kernels.cases import all_cases
from tests.kernels.conform import call, judge, replay, wanted
from tests.kernels.judges import JUDGES
from tests.kernels.loss_cases import LOSS_JUDGES, LOSSES
from tests.kernels.modal_judges import MODAL_JUDGES
from tests.kernels.modal_judges import OPS as MODAL
from tests.kernels.neuron_cases import NEURON_JUDGES
from tests.kernels.neuron_cases import OPS as NEURONS
from tests.kernels.ops import company
from tests.kernels.packed_cases import OPS as PACKED_OPS
from tests.kernels.packed_cases import PACKED_JUDGES
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
        ops = company(case.op)
        found = answer("tests.kernels.conform", *ops, "--kernels", "triton", "--device", "cpu", interpret=True)
        ok, _, detail = found[case.id]
    elif backend == "gpu":
        ok, _, detail = judge(case, "triton", "cuda")
    else:
        ok, _, detail = judge(case, "reference")
    assert ok, detail


def test_every_op_has_cases_in_every_dtype_it_takes() -> None:
    seen = {(case.op, case.dtype) for case in wanted("triton", "cpu")}
    floating = (torch.float64, torch.float32, torch.float16)
    ops = ("hessian_update", "joint_sweep", "cross_update", "descend", "clip_search", "admm_step")
    ops = (*ops, *PACKED_OPS, *LOSSES, *NEURONS, "keep_largest", "keep_of")
    assert {(op, d) for op in ops for d in floating} <= seen
    streams = ("vandermonde_adjoint", "modal_fit_step", "modal_chunk_prefill", "modal_step")
    assert {(op, d) for op in streams for d in floating} <= seen
    assert {(op, d) for op in ("vandermonde", "hyena_filter", "rational") for d in floating[:2]} <= seen
    assert ("vp_gram", torch.float64) in seen
    packing = ("pack", "unpack", "pack_bitmask", "unpack_bitmask")
    assert {("rng", torch.int32), *((op, torch.int8) for op in packing)} <= seen


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


def _case(name: str) -> Case:
    return next(case for case in all_cases() if case.id == name)


def test_the_judges_see_a_wrong_step_a_worse_grid_and_a_tie_broken_the_other_way() -> None:
    case = _case("descend-float32-37x32-asymmetric-columns")
    codes, values = descend(**case.make())
    row, column = case.make()["keep"].nonzero()[0].tolist()
    wrong = codes.clone()
    wrong[row, column] += 2 if wrong[row, column] < 6 else -2
    assert JUDGES["descend"](case, (codes, values), (codes, values)).ok
    assert not JUDGES["descend"](case, (wrong, values), (codes, values)).ok

    case = _case("clip_search-float32-37x32-4bit-masked-weighted-columns-bfloat16")
    found = clip_search(**case.make())
    whole = clip_search(**{**case.make(), "shares": (1.0,)})
    assert JUDGES["clip_search"](case, found, found).ok
    assert "error" in JUDGES["clip_search"](case, whole, found).detail
    assert not JUDGES["clip_search"](case, (found.scale * 1.01, found.zero), found).ok

    case = _case("keep_largest-float32-37x61-equal-1100")
    stays = torch.arange(37 * 61).view(37, 61) >= 1100
    assert JUDGES["keep_largest"](case, (stays,), ()).ok
    assert not JUDGES["keep_largest"](case, (stays.flip(0, 1),), ()).ok

    for op in PACKED_OPS:
        case = next(case for case in all_cases() if case.op == op and "float32-8x7x" in case.id)
        (product,) = call(op, case.make(), "reference")
        assert PACKED_JUDGES[op](case, (product,), (product,)).ok
        assert not PACKED_JUDGES[op](case, (product * (1 + 1e-5),), (product,)).ok

    for op in LOSSES:
        case = next(case for case in all_cases() if case.op == op and "float32-23x61x67-" in case.id)
        right = call(op, case.make(), "reference")
        assert LOSS_JUDGES[op](case, right, right).ok
        for place in range(len(right)):
            wrong = tuple(t * (1 + 5e-5) if place == at else t for at, t in enumerate(right))
            assert not LOSS_JUDGES[op](case, wrong, right).ok, place


def test_the_judges_of_sums_of_powers_see_a_digit_lost_in_any_result() -> None:
    names = {
        "vandermonde": "vandermonde-float32-1x9x131-rows",
        "vandermonde_adjoint": "vandermonde_adjoint-float32-1x9x131-rows",
        "modal_fit_step": "modal_fit_step-float32-1x9x131-rows",
        "vp_gram": "vp_gram-float64-1x9x8191-spread",
        "modal_chunk_prefill": "modal_chunk_prefill-float32-1x1x9x547-rows-state",
        "modal_step": "modal_step-float32-1x67x5x3-rows-bias",
        "hyena_filter": "hyena_filter-float32-19x5x7x11-2layers-slice",
        "rational": "rational-float32-2x5x17-slice",
    }
    assert names.keys() == MODAL.keys()
    for op, name in names.items():
        case = _case(name)
        right = call(op, case.make(), "reference")
        assert MODAL_JUDGES[op](case, right, right).ok, op
        loss = 2000 * torch.finfo(case.dtype).eps
        for place in range(len(right)):
            wrong = tuple(t * (1 + loss) if place == at else t for at, t in enumerate(right))
            assert not MODAL_JUDGES[op](case, wrong, right).ok, (op, place)


def test_the_judges_of_predicted_neurons_see_one_too_many_one_too_few_and_a_lost_digit() -> None:
    case = _case("predictor_out-float32-13x37x261-slice--0.5")
    index, count = call(case.op, case.make(), "reference")
    judge_of = NEURON_JUDGES[case.op]
    assert 0 < int(count[0]) < 128
    assert judge_of(case, (index, count), (index, count)).ok
    fewer, less = index.clone(), count.clone()
    fewer[0, int(count[0]) - 1], less[0] = -1, count[0] - 1
    assert "is active is not listed" in judge_of(case, (fewer, less), (index, count)).detail
    # Every fifth is never active.
    more, greater = index.clone(), count.clone()
    more[2], greater[2] = -1, 5
    more[2, :5] = torch.arange(256, 261)
    assert "not active is listed" in judge_of(case, (more, greater), (index, count)).detail
    swapped = index.clone()
    swapped[0, :2] = index[0, :2].flip(0)
    assert "not ascending" in judge_of(case, (swapped, count), (index, count)).detail
    for name in (
        "predictor_in-float32-13x523x5-slice",
        "sparse_mlp-float32-3x37x261-slice-0.3-relu-bias-gate-gatebias-offset",
        "reduce_add-float32-67x3x41-slice-bias-residual",
        "thresholded_linear-float32-3x37x61-slice-0.3",
    ):
        case = _case(name)
        (right,) = call(case.op, case.make(), "reference")
        assert NEURON_JUDGES[case.op](case, (right,), (right,)).ok
        assert not NEURON_JUDGES[case.op](case, (right * (1 + 2e-3),), (right,)).ok, name
