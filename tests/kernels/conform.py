"""Is an implementation of an op conformant?  `python -m tests.kernels.conform [OP ...]` prints a verdict per case.

Truth is the reference in float64. An implementation passes when its error is at most twice the reference's in the
same dtype plus c * eps(dtype) * scale; exact ops must be equal to the last bit. Fresh memory is filled with NaN.
Rounding to a grid is not continuous, so `joint_sweep` is judged in two halves: its codes must be nearest points of
the grid, up to the same bound, and everything else must follow from the codes it chose.

Run with `TRITON_INTERPRET=1` this judges the Triton kernels in the interpreter, and with a GPU on it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from rewright.kernels.admm_step import admm_step
from rewright.kernels.bitmask import pack_bitmask, unpack_bitmask
from rewright.kernels.bitmask_w4_gemv import bitmask_w4_gemv
from rewright.kernels.clip_search import clip_search
from rewright.kernels.cross_update import cross_update
from rewright.kernels.descend import descend
from rewright.kernels.dispatch import use
from rewright.kernels.hessian_update import hessian_update
from rewright.kernels.joint_sweep import JointSweep, joint_sweep
from rewright.kernels.pack import pack, unpack
from rewright.kernels.rng import random_bits
from rewright.kernels.select import keep_largest, keep_of
from rewright.kernels.w4a16_gemm import w4a16_gemm, w4a16_gemm_dx
from rewright.kernels.w4a16_gemv import w4a16_gemv
from tests.kernels import judges
from tests.kernels.bounds import Bounds, Verdict, on
from tests.kernels.case import Case
from tests.kernels.cases import all_cases
from tests.kernels.loss_cases import LOSS_JUDGES, LOSSES, results
from tests.kernels.modal_judges import DOUBLE, MODAL_JUDGES
from tests.kernels.modal_judges import OPS as MODAL
from tests.kernels.neuron_cases import NEURON_JUDGES
from tests.kernels.neuron_cases import OPS as NEURONS
from tests.kernels.packed_cases import PACKED_JUDGES


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, or with the largest integer."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # By default torch fills fresh memory so while it is asked to be deterministic.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


def call(op: str, arguments: dict[str, Any], choice: str) -> tuple[torch.Tensor, ...]:
    """The op's results under a kernel choice."""
    with use(choice), poisoned():
        if op == "hessian_update":
            hessian_update(**arguments)
            return (arguments["H"],)
        if op == "cross_update":
            cross_update(**arguments)
            return (arguments["total"],)
        if op == "admm_step":
            return admm_step(**arguments), arguments["dual"]
        if op in LOSSES:
            return results(op, arguments)
        if op in MODAL:
            return MODAL[op](arguments)
        if op in NEURONS:
            return NEURONS[op](arguments)
        several: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
            "joint_sweep": joint_sweep,
            "descend": descend,
            "clip_search": clip_search,
            "pack_bitmask": pack_bitmask,
        }
        if op in several:
            return several[op](**arguments)
        plain: dict[str, Callable[..., torch.Tensor]] = {
            "pack": pack,
            "unpack": unpack,
            "unpack_bitmask": unpack_bitmask,
            "rng": random_bits,
            "keep_largest": keep_largest,
            "keep_of": keep_of,
            "w4a16_gemv": w4a16_gemv,
            "w4a16_gemm": w4a16_gemm,
            "w4a16_gemm_dx": w4a16_gemm_dx,
            "bitmask_w4_gemv": bitmask_w4_gemv,
        }
        return (plain[op](**arguments),)


def judge(case: Case, choice: str, device: str = "cpu") -> Verdict:
    """Judge one case under the kernel choice `triton` or `reference` on a device."""
    extra = {"device": device} if case.op == "rng" else {}
    got = call(case.op, on(case.make(), device) | extra, choice)
    base = call(case.op, case.make(), "reference")
    if case.op == "hessian_update":
        return _judge_hessian(case, got[0].cpu(), base[0])
    if case.op == "joint_sweep":
        arguments = case.make()
        results = JointSweep(*(t.cpu() for t in got))
        verdict = _judge_sweep(case, arguments, results, JointSweep(*base))
        if case.exact and verdict.ok:
            return _equal([t.cpu() for t in got[:3]], list(base[:3]))
        return verdict
    mine = tuple(t.cpu() for t in got)
    judge_of = {**judges.JUDGES, **PACKED_JUDGES, **LOSS_JUDGES, **MODAL_JUDGES, **NEURON_JUDGES}
    if case.op in judge_of:
        verdict = judge_of[case.op](case, mine, base)
        if not (case.exact and verdict.ok):
            return verdict
    return _equal(list(mine), list(base))


def _equal(got: list[torch.Tensor], base: list[torch.Tensor]) -> Verdict:
    same = all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, base, strict=True))
    return Verdict(same, 0.0 if same else float("inf"), "" if same else "not equal to the reference")


def _judge_hessian(case: Case, got: torch.Tensor, base: torch.Tensor) -> Verdict:
    arguments = on(case.make(), "cpu", torch.float64)
    scale = arguments["H"].abs() + arguments["alpha"] * arguments["X"].abs().t() @ arguments["X"].abs()
    (truth,) = call("hessian_update", arguments, "reference")
    bounds = Bounds(got.dtype)
    bounds.add("H", got.double() - truth, base.double() - truth, scale)
    bounds.check("H is not symmetric", torch.equal(got, got.t()))
    return bounds.verdict()


class Replay(NamedTuple):
    """A sweep in float64 with the codes given: what follows from them, and how far each is from the nearest point."""

    dequantised: torch.Tensor
    error: torch.Tensor
    loss: torch.Tensor
    excess: torch.Tensor


def replay(arguments: dict[str, Any], codes: torch.Tensor) -> Replay:
    """Right-looking and column by column, written apart from both implementations."""
    given = on(arguments, "cpu", torch.float64)
    w, u = given["weight"].clone(), given["factor"]
    r, width = w.shape
    keep = torch.ones(r, width, dtype=torch.bool) if given["keep"] is None else given["keep"]
    zero = torch.zeros(r, dtype=torch.float64) if given["zero"] is None else given["zero"].double()
    scale = given["scale"]
    value, error, excess = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    for j in range(width):
        z = torch.where(keep[:, j], w[:, j], 0.0)
        if scale is None:
            value[:, j] = z
            excess[:, j] = codes[:, j].double().abs()
        else:
            level = codes[:, j].double() - zero
            value[:, j] = level * scale
            ideal = torch.where(scale == 0, 0.0, z / torch.where(scale == 0, 1.0, scale))
            nearest = ideal.clamp(given["low"] - zero, given["high"] - zero)
            excess[:, j] = ((level - nearest).abs() - 0.5).clamp(min=0.0)
            sure = ~keep[:, j] | (scale == 0)
            excess[:, j] = torch.where(sure, level.abs(), excess[:, j])
        error[:, j] = (w[:, j] - value[:, j]) / u[j, j]
        w[:, j:] -= error[:, j, None] * u[j, j:]
    return Replay(value, error, error.square().sum(dim=1) / 2, excess)


def _judge_sweep(case: Case, arguments: dict[str, Any], got: JointSweep, base: JointSweep) -> Verdict:
    truth, base_truth = replay(arguments, got.codes), replay(arguments, base.codes)
    bounds = Bounds(case.dtype)
    for name in ("dequantised", "error", "loss"):
        mine, theirs = getattr(truth, name), getattr(base_truth, name)
        bounds.add(name, getattr(got, name).double() - mine, getattr(base, name).double() - theirs, mine)
    span = torch.tensor(float(arguments["high"] - arguments["low"]))
    # Half precision is computed in float32, so its codes are held to float32.
    codes = Bounds(torch.promote_types(case.dtype, torch.float32))
    codes.add("codes", truth.excess, base_truth.excess, span)
    bounds.failures += codes.failures
    bounds.check("a zero is negative", not bool((torch.signbit(got.dequantised) & (got.dequantised == 0)).any()))
    for name in ("dequantised", "error", "loss"):
        bounds.check(f"{name} has another dtype", getattr(got, name).dtype == case.dtype)
    return bounds.verdict()


def wanted(choice: str, device: str, ops: list[str] | None = None) -> list[Case]:
    """The cases that a backend is judged on: the interpreter takes no bfloat16, a GPU's kernels mostly no float64."""
    cases = [case for case in all_cases() if not ops or case.op in ops]
    if choice == "triton":
        left_out = torch.bfloat16 if device == "cpu" else torch.float64
        cases = [case for case in cases if case.dtype != left_out or (device != "cpu" and case.op in DOUBLE)]
        if device != "cpu":
            cases = [case for case in cases if not case.label.endswith("-into64")]
    return cases


def verdicts(choice: str, device: str, ops: list[str] | None = None) -> dict[str, Verdict]:
    """Case id to verdict."""
    return {case.id: judge(case, choice, device) for case in wanted(choice, device, ops)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.conform", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", help="ops to judge (all)")
    parser.add_argument("--kernels", choices=("triton", "reference"), default="triton")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = verdicts(given.kernels, given.device, given.ops)
    if given.json:
        print(json.dumps({name: list(verdict) for name, verdict in found.items()}))
    else:
        for name, verdict in found.items():
            print(f"{'ok  ' if verdict.ok else 'FAIL'} {verdict.worst:6.2f} of the bound  {name}  {verdict.detail}")
    return 0 if all(verdict.ok for verdict in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
