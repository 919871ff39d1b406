"""The ops on powers and sums of poles against plain arithmetic, written apart; `test_conform` does the rest."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch

from rewright.kernels.hyena_filter import hyena_filter
from rewright.kernels.modal_chunk_prefill import modal_chunk_prefill
from rewright.kernels.modal_fit_step import modal_fit_step
from rewright.kernels.modal_step import modal_step
from rewright.kernels.rational import rational
from rewright.kernels.vandermonde import vandermonde, vandermonde_adjoint
from rewright.kernels.vp_gram import vp_gram
from tests.bench import hyena_filter as filter_bench
from tests.bench import modal_chunk_prefill as prefill_bench
from tests.bench import modal_fit_step as fit_bench
from tests.bench import modal_step as step_bench
from tests.bench import rational as rational_bench
from tests.bench import vandermonde as vandermonde_bench
from tests.bench import vp_gram as gram_bench
from tests.kernels.case import normal
from tests.kernels.modal_cases import logs_of


def _modes(channels: int, entries: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return logs_of(generator, channels, entries), normal(generator, channels, entries, 2)


def _exactly(logs: torch.Tensor, residues: torch.Tensor, times: np.ndarray) -> torch.Tensor:
    """h at some steps of one channel, in numpy's extended precision."""
    rate, angle = (logs[0, :, plane].numpy().astype(np.longdouble)[:, None] for plane in (0, 1))
    weight, turned = (residues[0, :, plane].numpy().astype(np.longdouble)[:, None] for plane in (0, 1))
    size = np.exp(rate * times)
    terms = size * (weight * np.cos(angle * times) - turned * np.sin(angle * times))
    return torch.from_numpy(terms.sum(axis=0).astype(np.float64))


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="needs a long double that is wider than a double")
@pytest.mark.parametrize("decay", [1e-9, 1e-4, 1e-2])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-7), (torch.float64, 2e-15)])
def test_long_responses_lose_no_digits_to_their_phases(dtype: torch.dtype, bound: float, decay: float) -> None:
    generator = torch.Generator().manual_seed(2)
    angle = torch.rand(1, 8, generator=generator, dtype=torch.float64) * 6.28 - 3.14
    logs = torch.stack((torch.full_like(angle, -decay), angle), dim=-1).to(dtype)
    residues = normal(generator, 1, 8, 2).to(dtype)
    length = 8192
    h = vandermonde(logs, residues, length)[0].double()
    truth = _exactly(logs, residues, np.arange(length).astype(np.longdouble))
    assert (h - truth).norm() <= bound * truth.norm()
    if dtype == torch.float32 and decay < 1e-3:
        naive = vandermonde_bench.exponentials(logs, residues, length)[0].double()
        assert (naive - truth).norm() > 100 * (h - truth).norm()


def test_a_pole_at_0_has_the_powers_1_0_0() -> None:
    logs = torch.tensor([[[-torch.inf, 0.5], [-torch.inf, 0.0]]], dtype=torch.float64)
    residues = torch.tensor([[[2.0, 1.0], [0.0, 0.0]]], dtype=torch.float64)
    logs, residues = logs.requires_grad_(), residues.requires_grad_()
    h = vandermonde(logs, residues, 40)
    assert torch.equal(h.detach(), torch.nn.functional.pad(torch.tensor([[2.0]], dtype=torch.float64), (0, 39)))
    slopes = torch.autograd.grad(h.sum(), (logs, residues))
    assert torch.equal(slopes[0], torch.zeros_like(slopes[0]))
    assert torch.equal(slopes[1], torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], dtype=torch.float64))
    for gram in vp_gram(logs, 40)[1:]:
        assert gram.abs().max() == 0
    _, state = modal_chunk_prefill(torch.ones(1, 1, 100, dtype=torch.float64), logs, residues, torch.zeros(1).double())
    assert torch.equal(state, torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]], dtype=torch.float64))


@pytest.mark.parametrize("length", [1, 17])
def test_gradients_in_poles_and_residues(length: int) -> None:
    logs, residues = (t.requires_grad_() for t in _modes(2, 3))
    finite = logs.detach().clamp(min=-3).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: vandermonde(a, b, length), (finite, residues))
    points = torch.view_as_real(torch.polar(torch.ones(length), torch.arange(length) / 3.0)).double()
    poles = finite.detach().tanh().requires_grad_()
    direct = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, r, d: rational(points, p, r, d), (poles, residues, direct))


def test_a_transfer_function_is_the_transform_of_the_response() -> None:
    logs, residues = _modes(2, 3)
    logs[..., 0].clamp_(max=-0.1)
    angle = torch.linspace(-3, 3, 17, dtype=torch.float64)
    poles = torch.polar(logs[..., 0].exp(), logs[..., 1])
    both = torch.view_as_real(torch.cat((poles, poles.conj()), dim=1).resolve_conj())
    halves = torch.view_as_complex(residues) / 2
    weights = torch.view_as_real(torch.cat((halves, halves.conj()), dim=1).resolve_conj())
    found = rational(torch.stack((angle.cos(), angle.sin()), dim=-1), both, weights, torch.zeros(2, 2).double())
    times = torch.arange(1, 600, dtype=torch.float64)
    truth = vandermonde(logs, residues, 599).to(torch.complex128) @ torch.exp(-1j * times[:, None] * angle)
    assert torch.allclose(torch.view_as_complex(found), truth, rtol=1e-12, atol=1e-12)


def test_the_blocks_of_the_gram_matrices_are_those_of_the_fit() -> None:
    """A step of the fit has the same gradients by Gram matrices and by its own sums."""
    logs, residues = _modes(3, 4)
    target = torch.zeros(3, 300, dtype=torch.float64)
    loss, d_logs, d_residues = modal_fit_step(target, logs, residues)
    gram, gram_t, _ = vp_gram(logs, 300)
    weights = torch.cat((residues[..., 0], residues[..., 1]), dim=1)[:, :, None]
    assert torch.allclose((weights.transpose(1, 2) @ gram @ weights)[:, 0, 0], loss, rtol=1e-12)
    real, imaginary = (gram @ weights)[..., 0].chunk(2, dim=1)
    assert torch.allclose(torch.stack((real, imaginary), dim=-1) * 2, d_residues, rtol=1e-12, atol=1e-10)
    real, imaginary = (gram_t @ weights)[..., 0].chunk(2, dim=1)
    slope = residues[..., 0] * real + residues[..., 1] * imaginary
    assert torch.allclose(2 * slope, d_logs[..., 0], rtol=1e-11, atol=1e-9)


def _convolved(u: torch.Tensor, logs: torch.Tensor, residues: torch.Tensor, h0: torch.Tensor) -> torch.Tensor:
    """Sample by sample, with p to the power of the lag."""
    h = torch.cat((h0[:, None], vandermonde(logs, residues, u.shape[2])), dim=1)
    return torch.stack([(u[..., : t + 1] * h[:, : t + 1].flip(1)).sum(dim=2) for t in range(u.shape[2])], dim=2)


@pytest.mark.parametrize("cuts", [(0, 1, 2, 200), (0, 64, 128, 200), (0, 0, 77, 199, 200), (0, 200)])
def test_prompts_split_anyhow_give_the_convolution(cuts: tuple[int, ...]) -> None:
    logs, residues = _modes(3, 4)
    generator = torch.Generator().manual_seed(5)
    u, h0 = normal(generator, 2, 200, 3).transpose(1, 2), normal(generator, 3)
    truth = _convolved(u, logs, residues, h0)
    state, found = None, []
    for start, stop in pairwise(cuts):
        given = None if state is None else state.clone()
        y, after = modal_chunk_prefill(u[..., start:stop], logs, residues, h0, state)
        assert given is None or torch.equal(given, state)
        found, state = [*found, y], after
    assert (torch.cat(found, dim=2) - truth).abs().max() <= 1e-12 * truth.abs().max()
    whole = modal_chunk_prefill(u, logs, residues, h0)[1]
    assert torch.allclose(state, whole, rtol=1e-12, atol=1e-12)


def test_steps_go_on_where_a_prompt_ended() -> None:
    generator = torch.Generator().manual_seed(6)
    logs, residues = _modes(5, 3)
    h0, taps, bias = normal(generator, 5), normal(generator, 15, 3), normal(generator, 15)
    z = normal(generator, 2, 15, 90)
    short = torch.nn.functional.conv1d(torch.nn.functional.pad(z, (2, 0)), taps[:, None], bias, groups=15)
    outer, inner, value = short.chunk(3, dim=1)
    truth = outer * _convolved(inner * value, logs, residues, h0)
    _, state = modal_chunk_prefill((inner * value)[..., :70], logs, residues, h0)
    recent = z[..., 68:70].clone()
    poles = torch.view_as_real(torch.polar(logs[..., 0].exp(), logs[..., 1]))
    for t in range(70, 90):
        y = modal_step(z[..., t], recent, taps, bias, state, poles, residues, h0)
        assert torch.allclose(y, truth[..., t], rtol=1e-10, atol=1e-10)
    assert torch.equal(recent, z[..., 88:])


def test_a_half_precision_prompt_has_a_float32_state() -> None:
    logs, residues = (t.float() for t in _modes(2, 3))
    u = torch.randn(1, 2, 150, generator=torch.Generator().manual_seed(7)).bfloat16()
    y, state = modal_chunk_prefill(u, logs, residues, torch.ones(2))
    wide, exact = modal_chunk_prefill(u.float(), logs, residues, torch.ones(2))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.allclose(state, exact, rtol=1e-5, atol=1e-6)
    assert torch.allclose(y.float(), wide, rtol=5e-3, atol=1e-6)


def test_the_peers_that_are_timed_compute_the_same() -> None:
    torch.manual_seed(8)
    logs, residues = vandermonde_bench.modes(3, 4, "cpu")
    exact = {"rtol": 1e-3, "atol": 1e-3}
    h = vandermonde(logs, residues, 120)
    assert torch.allclose(vandermonde_bench.exponentials(logs, residues, 120), h, **exact)
    target = torch.randn(3, 120)
    for mine, theirs in (
        (vandermonde_adjoint(logs, target), vandermonde_bench.folded(logs, target)),
        (modal_fit_step(target, logs, residues), fit_bench.eager(target, logs, residues)),
        (vp_gram(logs.double(), 120), gram_bench.products(logs.double(), 120)),
    ):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
    h0, u = torch.ones(3), torch.randn(2, 3, 100)
    response = torch.cat((h0[:, None], h[:, :99]), dim=1)
    assert torch.allclose(modal_chunk_prefill(u, logs, residues, h0)[0], prefill_bench.convolved(u, response), **exact)
    given = step_bench.arguments(2, 5, "cpu")
    other = [t.clone() for t in given]
    assert torch.allclose(modal_step(*given), step_bench.eager(*other), **exact)
    assert torch.allclose(given[4], other[4], **exact)
    net = filter_bench.network(50, 5, 7, "cpu")
    assert torch.allclose(hyena_filter(*net), filter_bench.eager(*net), **exact)
    points, poles = torch.randn(9, 2), torch.randn(3, 4, 2)
    case = points, poles, residues, torch.randn(3, 2)
    assert torch.allclose(rational(*case), rational_bench.quotients(*case), rtol=1e-3, atol=1e-2)


REFUSED: list[tuple[str, Callable[[torch.Tensor], object]]] = [
    ("logs must be float32 or float64", lambda t: vandermonde(t.half(), t, 3)),
    ("residues must be float32 or float64", lambda t: vandermonde(t, t[:, :2], 3)),
    ("length must be from 0", lambda t: vandermonde(t, t, -1)),
    ("values must be floating point", lambda t: vandermonde_adjoint(t, torch.zeros(3, 4))),
    ("target must be floating point", lambda t: modal_fit_step(torch.zeros(2, 4, dtype=torch.int32), t, t)),
    ("logs must be float64", lambda t: vp_gram(t, 3)),
    ("u must be floating point", lambda t: modal_chunk_prefill(torch.zeros(1, 3, 5), t, t, torch.zeros(2))),
    ("h0 must be", lambda t: modal_chunk_prefill(torch.zeros(1, 2, 5), t, t, torch.zeros(3))),
    ("state must be", lambda t: modal_chunk_prefill(torch.zeros(1, 2, 5), t, t, torch.zeros(2), t)),
    ("poles must be", lambda t: rational(t[0], t.bfloat16(), t, t[:, 0])),
    ("of one dtype", lambda t: rational(t[0].double(), t, t, t[:, 0])),
    (
        "are no network of sines",
        lambda t: hyena_filter(t[0], torch.zeros(3), [torch.zeros(1, 2)], [], [], torch.zeros(1)),
    ),
    (
        "frequencies must be",
        lambda t: hyena_filter(
            t[0], torch.zeros(3), [torch.zeros(4, 2), torch.zeros(1, 4)], [torch.zeros(4)], [t], torch.zeros(1)
        ),
    ),
]


@pytest.mark.parametrize(("text", "call"), REFUSED, ids=[text for text, _ in REFUSED])
def test_wrong_operands_are_refused(text: str, call: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(ValueError, match=text):
        call(torch.zeros(2, 3, 2))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("z", torch.zeros(1, 7), "z must be"),
        ("recent", torch.zeros(1, 6, 2).half(), "recent must be"),
        ("taps", torch.zeros(6, 17), "taps must be"),
        ("bias", torch.zeros(5), "bias must be"),
        ("state", torch.zeros(1, 2, 3, 2).double(), "state must be contiguous"),
        ("state", torch.zeros(1, 2, 3, 4)[..., ::2], "state must be contiguous"),
    ],
)
def test_wrong_operands_of_a_step_are_refused(name: str, value: torch.Tensor, text: str) -> None:
    poles = torch.zeros(2, 3, 2)
    given = {"z": torch.zeros(1, 6), "recent": torch.zeros(1, 6, 2), "taps": torch.zeros(6, 3), "bias": None}
    given |= {"state": torch.zeros(1, 2, 3, 2), "poles": poles, "residues": poles, "h0": torch.zeros(2)}
    with pytest.raises(ValueError, match=text):
        modal_step(**(given | {name: value}))
