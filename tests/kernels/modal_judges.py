"""How results of the ops on sums of powers and of poles are judged: by the reference in float64, which `test_modal_ops`
holds against plain arithmetic, and by how much was added up in each result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rewright.kernels.dispatch import use
from rewright.kernels.hyena_filter import hyena_filter
from rewright.kernels.modal_chunk_prefill import modal_chunk_prefill
from rewright.kernels.modal_fit_step import modal_fit_step
from rewright.kernels.modal_step import modal_step
from rewright.kernels.rational import rational
from rewright.kernels.vandermonde import vandermonde, vandermonde_adjoint
from rewright.kernels.vp_gram import vp_gram
from tests.kernels.bounds import Bounds, Verdict, on
from tests.kernels.case import Case

Results = tuple[torch.Tensor, ...]
Given = dict[str, Any]


def _with_gradients(op: Callable[..., torch.Tensor], given: Given, names: tuple[str, ...]) -> Results:
    """Values, and the gradients of their sum weighted by `upstream`."""
    arguments = {name: value for name, value in given.items() if name != "upstream"}
    leaves = [arguments[name].requires_grad_() for name in names]
    found = op(**arguments)
    return found.detach(), *torch.autograd.grad(found, leaves, given["upstream"])


def _step(given: Given) -> Results:
    return modal_step(**given), given["state"], given["recent"]


OPS: dict[str, Callable[[Given], Results]] = {
    "vandermonde": lambda given: _with_gradients(vandermonde, given, ("logs", "residues")),
    "vandermonde_adjoint": lambda given: vandermonde_adjoint(**given),
    "modal_fit_step": lambda given: modal_fit_step(**given),
    "vp_gram": lambda given: vp_gram(**given),
    "modal_chunk_prefill": lambda given: modal_chunk_prefill(**given),
    "modal_step": _step,
    "hyena_filter": lambda given: (hyena_filter(**given),),
    "rational": lambda given: _with_gradients(rational, given, ("poles", "residues", "direct")),
}
# Their kernels take float64 on a GPU too.
DOUBLE = ("vp_gram", "rational")


def sizes(given: Given) -> Given:
    """Arguments of which every sum has the absolute values of its terms: moduli in place of complex numbers."""
    plain = {}
    for name, value in given.items():
        if name in ("residues", "poles", "state") and value is not None:
            plain[name] = torch.stack((torch.hypot(*value.unbind(-1)), torch.zeros_like(value[..., 0])), dim=-1)
        elif name == "logs":
            plain[name] = value * torch.tensor((1.0, 0.0))
        else:
            plain[name] = value.abs() if isinstance(value, torch.Tensor) else value
    return plain


def _sum_scales(given: Given) -> Results:
    sums, moments = vandermonde_adjoint(given["logs"], given["upstream"])
    h = vandermonde(given["logs"], given["residues"], given["length"])
    return h, given["residues"][..., :1] * moments, sums


def _fit_scales(given: Given) -> Results:
    size = vandermonde(given["logs"], given["residues"], given["target"].shape[1]) + given["target"]
    sums, moments = vandermonde_adjoint(given["logs"], size)
    return size.square().sum(dim=1), 2 * given["residues"][..., :1] * moments, 2 * sums


def _filter_scales(given: Given) -> Results:
    """What an error of one unit in each sum becomes on its way through the sines, of slope at most 1."""
    x, error = given["features"], torch.zeros_like(given["features"])
    *inner, last = (weight.abs() for weight in given["weights"])
    for weight, bias, frequency in zip(inner, given["biases"], given["frequencies"], strict=True):
        error = frequency.abs() * ((x + error) @ weight.t() + bias.abs()) + 1
        x = torch.ones_like(error)
    window = (-given["times"][:, None] * given["deltas"].abs()).exp() + given["shift"]
    return (((x + error) @ last.t() * window).t(),)


def _rational_scales(given: Given) -> Results:
    x, p, r, d, g = (
        torch.view_as_complex(given[name].contiguous())
        for name in ("points", "poles", "residues", "direct", "upstream")
    )
    # Where an entry without a residue has its pole nothing is added up.
    f = torch.nan_to_num(1 / (x[None, :, None] - p[:, None]).abs(), posinf=0.0)
    values = d.abs()[:, None] + (r.abs()[:, None] * f).sum(dim=2)
    weighted = g.abs()[..., None] * f
    return values, (r.abs()[:, None] * weighted * f).sum(dim=1), weighted.sum(dim=1), g.abs().sum(dim=1)


SCALES: dict[str, Callable[[Given], Results]] = {
    "vandermonde": lambda given: _sum_scales(sizes(given)),
    "modal_fit_step": lambda given: _fit_scales(sizes(given)),
    "hyena_filter": _filter_scales,
    "rational": _rational_scales,
}


# What these return is float32 at least, also where they read half precision.
_IN_FLOAT32 = ("vandermonde_adjoint", "modal_fit_step")


def _judge(case: Case, got: Results, base: Results) -> Verdict:
    with use("reference"):
        truth = OPS[case.op](on(case.make(), "cpu", torch.float64))
        scales = SCALES.get(case.op, lambda plain: OPS[case.op](sizes(plain)))(on(case.make(), "cpu", torch.float64))
    bounds = Bounds(torch.promote_types(case.dtype, torch.float32) if case.op in _IN_FLOAT32 else case.dtype)
    for place, (exact, scale, mine, theirs) in enumerate(zip(truth, scales, got, base, strict=True)):
        bounds.add(f"result {place}", mine.double() - exact, theirs.double() - exact, scale)
        bounds.check(f"result {place} has another dtype", mine.dtype == theirs.dtype)
        bounds.check(f"result {place} has another shape", mine.shape == exact.shape)
    if case.op == "modal_step":
        bounds.check("what is remembered differs", torch.equal(got[2], base[2]))
    return bounds.verdict()


def _judge_gram(case: Case, got: Results, base: Results) -> Verdict:
    """Truth is the sum itself, step by step."""
    logs, length = case.make()["logs"], case.make()["length"]
    channels, entries, _ = logs.shape
    apart = logs.reshape(channels * entries, 1, 2)
    planes = [torch.tensor(plane, dtype=torch.float64).expand_as(apart) for plane in ((1.0, 0.0), (0.0, 1.0))]
    with use("reference"):
        basis = torch.cat([vandermonde(apart, r, length).view(channels, entries, length) for r in planes], dim=1)
    times = torch.arange(length, dtype=torch.float64)
    bounds = Bounds(case.dtype)
    for place, (mine, theirs) in enumerate(zip(got, base, strict=True)):
        truth = (basis * times**place) @ basis.transpose(1, 2)
        size = (basis.abs() * times**place) @ basis.abs().transpose(1, 2)
        bounds.add(f"moment {place}", mine - truth, theirs - truth, size)
        bounds.check(f"moment {place} has another dtype", mine.dtype == torch.float64)
        bounds.check(f"moment {place} has another shape", mine.shape == truth.shape)
    return bounds.verdict()


MODAL_JUDGES: dict[str, Callable[[Case, Results, Results], Verdict]] = dict.fromkeys(OPS, _judge)
MODAL_JUDGES["vp_gram"] = _judge_gram
