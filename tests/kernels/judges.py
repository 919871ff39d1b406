"""How results of the ops that choose zeros, grids and codes are judged; each truth is written apart from the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tests.kernels.bounds import Bounds, Verdict, on
from tests.kernels.case import Case

Results = tuple[torch.Tensor, ...]


def _cross_update(case: Case, got: Results, base: Results) -> Verdict:
    given = on(case.make(), "cpu", torch.float64)
    total, left, right, alpha = (given[name] for name in ("total", "left", "right", "alpha"))
    truth = total + alpha * (left.t() @ right)
    bounds = Bounds(got[0].dtype)
    scale = total.abs() + alpha * left.abs().t() @ right.abs()
    bounds.add("total", got[0].double() - truth, base[0].double() - truth, scale)
    return bounds.verdict()


def _admm_step(case: Case, got: Results, base: Results) -> Verdict:
    given = on(case.make(), "cpu", torch.float64)
    total = given["weight"] + given["dual"]
    kept = torch.where(given["keep"], total, 0.0)
    dual = given["dual"] + given["weight"] - kept
    rhs = given["target"] + kept - dual
    scale = given["target"].abs() + given["weight"].abs() + given["dual"].abs()
    bounds = Bounds(case.dtype)
    for name, truth, mine, theirs in (("rhs", rhs, got[0], base[0]), ("dual", dual, got[1], base[1])):
        bounds.add(name, mine.double() - truth, theirs.double() - truth, scale)
        bounds.check(f"{name} has another dtype", mine.dtype == case.dtype)
    return bounds.verdict()


def _select(case: Case, got: Results, _base: Results) -> Verdict:
    """The stable order of a full sort says what stays."""
    given = case.make()
    score = given["score"].double()
    parts = score.reshape(1, -1) if case.op == "keep_largest" else score.reshape(-1, given["of"])
    prune = given["prune"] if case.op == "keep_largest" else given["of"] - given["keep"]
    truth = torch.ones(parts.shape, dtype=torch.bool)
    truth.scatter_(1, parts.sort(dim=1, stable=True).indices[:, :prune], False)
    bounds = Bounds(torch.float32)
    bounds.check("others stay than should", torch.equal(got[0], truth.view(score.shape)))
    return bounds.verdict()


class Descended(NamedTuple):
    """A pass in float64 with the codes given: its values, and how far each code is from the nearest point."""

    dequantised: torch.Tensor
    excess: torch.Tensor


def replay_descent(arguments: dict[str, Any], codes: torch.Tensor) -> Descended:
    """Right-looking and column by column."""
    given = on(arguments, "cpu", torch.float64)
    old, slope, hessian, scale = given["value"], given["gradient"].clone(), given["hessian"], given["scale"]
    r, width = old.shape
    keep = torch.ones(r, width, dtype=torch.bool) if given["keep"] is None else given["keep"]
    zero = torch.zeros(r, dtype=torch.float64) if given["zero"] is None else given["zero"].double()
    value, excess = torch.zeros_like(old), torch.zeros_like(old)
    for j in range(width):
        z = torch.where(keep[:, j], old[:, j] - slope[:, j] / hessian[j, j], 0.0)
        level = codes[:, j].double() - zero
        if scale is None:
            value[:, j] = z
            excess[:, j] = codes[:, j].double().abs()
        else:
            value[:, j] = level * scale
            ideal = torch.where(scale == 0, 0.0, z / torch.where(scale == 0, 1.0, scale))
            nearest = ideal.clamp(given["low"] - zero, given["high"] - zero)
            away = ((level - nearest).abs() - 0.5).clamp(min=0.0)
            excess[:, j] = torch.where(~keep[:, j] | (scale == 0), level.abs(), away)
        slope += (value[:, j] - old[:, j])[:, None] * hessian[j]
    return Descended(value, excess)


def _descend(case: Case, got: Results, base: Results) -> Verdict:
    arguments = case.make()
    truth, base_truth = replay_descent(arguments, got[0]), replay_descent(arguments, base[0])
    bounds = Bounds(case.dtype)
    values = truth.dequantised
    bounds.add("dequantised", got[1].double() - values, base[1].double() - base_truth.dequantised, values)
    # Half precision is computed in float32, so its codes are held to float32.
    codes = Bounds(torch.promote_types(case.dtype, torch.float32))
    codes.add("codes", truth.excess, base_truth.excess, torch.tensor(float(arguments["high"] - arguments["low"])))
    bounds.failures += codes.failures
    bounds.check("a zero is negative", not bool((torch.signbit(got[1]) & (got[1] == 0)).any()))
    bounds.check("codes have another dtype", got[0].dtype == torch.int8)
    bounds.check("dequantised has another dtype", got[1].dtype == case.dtype)
    return bounds.verdict()


class Grids(NamedTuple):
    """All that a search may choose from: scale and zero point (shares, r), and their errors in float64."""

    scale: torch.Tensor
    zero: torch.Tensor
    error: torch.Tensor

    def excess(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """How much more than the least error a choice has, (r,); infinite where it is none of the grids."""
        same = (self.scale == scale.double()) & (self.zero == zero.double())
        return torch.where(same, self.error, torch.inf).amin(dim=0) - self.error.amin(dim=0)


def grids_of(arguments: dict[str, Any]) -> Grids:
    """The grid of each share. Scales are made in the dtype that the op computes in, since each is rounded alone."""
    weight, stored = arguments["weight"], arguments["stored"]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    kept = weight.to(dtype) if arguments["keep"] is None else torch.where(arguments["keep"], weight.to(dtype), 0.0)
    padded = torch.nn.functional.pad(kept, (0, 1))
    first, last = -(2 ** (arguments["bits"] - 1)), 2 ** (arguments["bits"] - 1) - 1
    importance = arguments["importance"]
    weighting = torch.ones(weight.shape[1]) if importance is None else importance
    least = {torch.float16: 2.0**-24}.get(stored, 2.0**-126)
    scales, zeros, errors = [], [], []
    for share in arguments["shares"]:
        low, high = padded.amin(dim=1) * share, padded.amax(dim=1) * share
        reach = 2 * torch.maximum(-low, high) if arguments["symmetric"] else high - low
        scale = (reach / (last - first)).clamp(max=torch.finfo(stored).max).to(stored).double().clamp(min=least)
        scale = torch.where(reach > 0, scale, 1.0)
        zero = torch.zeros_like(scale)
        if not arguments["symmetric"]:
            zero = ((-low / scale.to(dtype)).round() + first).clamp(first, last).double()
        codes = ((kept.double() / scale[:, None]).round() + zero[:, None]).clamp(first, last)
        miss = (codes - zero[:, None]) * scale[:, None] - kept.double()
        scales.append(scale)
        zeros.append(zero)
        errors.append(miss.square() @ weighting.double())
    return Grids(torch.stack(scales), torch.stack(zeros), torch.stack(errors))


def _clip_search(case: Case, got: Results, base: Results) -> Verdict:
    """The choice jumps where two grids are equally good: any of the least error, up to the bound, will do."""
    arguments = case.make()
    bounds = Bounds(torch.promote_types(case.dtype, torch.float32))
    bounds.check("scale or zero is not float32", all(t.dtype == torch.float32 for t in got))
    grids = grids_of(arguments)
    if len(arguments["shares"]) == 1:
        grids = grids._replace(error=torch.zeros_like(grids.error))
    weight = arguments["weight"].double().square()
    scale = weight if arguments["importance"] is None else weight * arguments["importance"].double()
    bounds.add("error", grids.excess(*got), grids.excess(*base), scale.sum(dim=1))
    bounds.check("the reference chose no grid", bool(torch.isfinite(grids.excess(*base)).all()))
    return bounds.verdict()


JUDGES: dict[str, Callable[[Case, Results, Results], Verdict]] = {
    "cross_update": _cross_update,
    "admm_step": _admm_step,
    "keep_largest": _select,
    "keep_of": _select,
    "descend": _descend,
    "clip_search": _clip_search,
}
