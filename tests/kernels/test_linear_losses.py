"""What the losses of a linear head promise besides numbers: bounds, memory, when a gradient is taken, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rewright.kernels import dispatch, linear_loss
from rewright.kernels.linear_cross_entropy import linear_cross_entropy
from rewright.kernels.linear_kl import linear_kl
from tests.kernels.case import normal
from tests.kernels.loss_cases import LOSSES

HALVES = (torch.bfloat16, torch.float16)


def _head(seed: int, tokens: int = 9, columns: int = 23, width: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return normal(generator, tokens, width), normal(generator, columns, width)


def _teacher(seed: int, tokens: int, columns: int, known: int) -> dict[str, torch.Tensor]:
    logits = 2 * normal(torch.Generator().manual_seed(seed), tokens, columns)
    top = logits.topk(known, dim=1)
    return {"ids": top.indices, "logits": top.values, "log_sum_exp": logits.logsumexp(dim=1)}


def _arguments(op: str, tokens: int = 9, columns: int = 23) -> dict[str, torch.Tensor]:
    hidden, weight = _head(1, tokens, columns)
    targets = torch.arange(tokens) % columns
    others = {"targets": targets} if op == "linear_cross_entropy" else _teacher(2, tokens, columns, 4)
    return {"hidden": hidden, "weight": weight, **others}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 20), st.integers(1, 6), st.integers(2, 40))
def test_more_known_tokens_never_lower_the_divergence_and_all_make_it_whole(
    seed: int, tokens: int, columns: int
) -> None:
    hidden, weight = _head(seed, tokens, columns)
    teacher = 2 * normal(torch.Generator().manual_seed(seed + 1), tokens, columns)
    log_p, log_q = teacher.log_softmax(dim=1), (hidden @ weight.t()).log_softmax(dim=1)
    whole = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    before = torch.zeros_like(whole)
    for known in range(1, columns + 1):
        loss = linear_kl(hidden, weight, **_teacher(seed + 1, tokens, columns, known)).losses
        assert (loss >= before - 1e-12).all()
        before = loss
    assert torch.allclose(before, whole, rtol=1e-12, atol=1e-12)


def test_a_teacher_sure_of_one_token_is_a_target() -> None:
    hidden, weight = _head(3)
    ids = torch.arange(9)[:, None]
    sure = linear_kl(hidden, weight, ids, torch.zeros(9, 1), torch.zeros(9), softcap=3.0)
    entropy = linear_cross_entropy(hidden, weight, ids[:, 0], softcap=3.0)
    assert torch.allclose(sure.losses, entropy.losses, rtol=1e-13)


def test_others_that_a_student_rules_out_are_still_weighed() -> None:
    weight = torch.zeros(5, 1, dtype=torch.float64)
    weight[0] = 60.0
    hidden = torch.ones(1, 1, dtype=torch.float32).requires_grad_()
    half = torch.full((1, 1), 0.5).log()
    loss = linear_kl(hidden, weight.float(), torch.zeros(1, 1, dtype=torch.int32), half, torch.zeros(1))
    torch.autograd.backward(loss.total)
    # log(1/2) less log q of either outcome, q being 1 and 4 e^-60
    assert float(loss.losses) == pytest.approx(0.5 * (60 - torch.tensor(16.0).log().item()), rel=1e-6)
    assert hidden.grad is not None
    assert float(hidden.grad) == pytest.approx(30.0, rel=1e-6)


@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_the_gradient_is_that_of_finite_differences(op: str, softcap: float | None) -> None:
    given = _arguments(op, 5, 11)
    hidden, weight = given.pop("hidden").requires_grad_(), given.pop("weight").requires_grad_()
    weights = torch.tensor([1.0, 0.0, -0.5, 2.0, 0.25])

    def total(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return LOSSES[op](a, b, **given, weights=weights, softcap=softcap).total

    assert torch.autograd.gradcheck(total, (hidden, weight))


@pytest.mark.parametrize("op", LOSSES)
def test_products_are_made_for_what_wants_a_gradient_and_none_in_the_backward_pass(op: str) -> None:
    seen: list[str] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.name().split(".")[0] in ("aten::mm", "aten::addmm_", "aten::addmm", "aten::bmm"):
                seen.append(func.name())
            return func(*args, **(kwargs or {}))

    def count(call: Callable[[], object]) -> int:
        seen.clear()
        with Products():
            call()
        return len(seen)

    given = _arguments(op)
    hidden, weight = given["hidden"], given["weight"]
    assert count(lambda: LOSSES[op](**given)) == 1
    hidden.requires_grad_()
    assert count(lambda: LOSSES[op](**given)) == 2
    weight.requires_grad_()
    assert count(lambda: LOSSES[op](**given)) == 3
    with torch.no_grad():
        assert count(lambda: LOSSES[op](**given)) == 1
    loss = LOSSES[op](**given)
    assert not loss.losses.requires_grad
    first = torch.autograd.grad(loss.total, (hidden, weight), retain_graph=True)
    seen.clear()
    with Products():
        second = torch.autograd.grad(loss.total, (hidden, weight))
    assert not seen
    assert all(torch.equal(*both) for both in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", LOSSES)
def test_nothing_as_large_as_all_logits_is_made(op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                largest = max(largest, made.numel())
            return made

    given = _arguments(op, 96, 500)
    given["hidden"] = given["hidden"].to(dtype).requires_grad_()
    given["weight"] = given["weight"].to(dtype)
    whole = torch.autograd.grad(LOSSES[op](**given).total, given["hidden"])[0]
    monkeypatch.setitem(linear_loss.ELEMENTS, "cpu", 4000)
    with Sizes():
        parts = torch.autograd.grad(LOSSES[op](**given).total, given["hidden"])[0]
    assert largest <= 4000
    tolerance = 8 * torch.finfo(dtype).eps
    assert torch.allclose(parts, whole, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op", LOSSES)
def test_a_mean_over_many_tokens_is_not_lost_in_half_precision(op: str) -> None:
    given = _arguments(op)
    hidden, weight = given.pop("hidden"), given.pop("weight")
    share = torch.full((9,), 2.0**-20)
    for dtype in HALVES:
        leaves = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        plain = torch.autograd.grad(LOSSES[op](*leaves, **given).total, leaves)
        mean = LOSSES[op](*leaves, **given, weights=share).total
        # as a scaler of gradients would
        scaled = torch.autograd.grad(mean * 2.0**20, leaves)
        assert all(torch.equal(*both) for both in zip(plain, scaled, strict=True))


def test_ignored_tokens_may_hold_anything() -> None:
    hidden, weight = _head(4)
    targets = torch.arange(9)
    targets[2] = -100
    hidden[2] = torch.nan
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    torch.autograd.backward(loss.total)
    assert hidden.grad is not None
    assert loss.losses[2] == 0
    assert not hidden.grad[2].any()
    assert torch.isfinite(hidden.grad).all()
    nothing = linear_cross_entropy(hidden, weight, torch.full((9,), 23), ignore_index=23)
    assert nothing.total == 0


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_logits_are_rounded_once_and_what_follows_is_not(dtype: torch.dtype) -> None:
    hidden, weight = (matrix.to(dtype) for matrix in _head(5, 9, 101, 33))
    targets = torch.arange(9)
    logits = (hidden.float() @ weight.float().t()).to(dtype).float()
    truth = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(linear_cross_entropy(hidden, weight, targets).losses, truth, rtol=1e-5, atol=1e-5)


def test_the_call_is_counted_once() -> None:
    dispatch.reset_tally()
    for op in LOSSES:
        LOSSES[op](**_arguments(op))
    counts = {"triton": 0, "reference": 1}
    assert dispatch.tally() == {"linear_cross_entropy": counts, "linear_kl": counts}


def _refused() -> list[tuple[str, Callable[[], object]]]:
    hidden, weight = torch.zeros(3, 2), torch.zeros(5, 2)
    targets, ids = torch.zeros(3, dtype=torch.int64), torch.tensor([[0, 1]] * 3)
    logits, norm = torch.zeros(3, 2), torch.zeros(3)
    return [
        ("hidden must be", lambda: linear_cross_entropy(hidden[0], weight, targets)),
        ("hidden must be", lambda: linear_cross_entropy(hidden.int(), weight, targets)),
        (r"weight must be torch.float32 \(V, 2\)", lambda: linear_cross_entropy(hidden, weight.double(), targets)),
        ("weight must be", lambda: linear_cross_entropy(hidden, weight[:, :1], targets)),
        ("weight must be", lambda: linear_cross_entropy(hidden, weight[:0], targets)),
        ("weights must be", lambda: linear_cross_entropy(hidden, weight, targets, torch.ones(2))),
        ("softcap must be above 0", lambda: linear_cross_entropy(hidden, weight, targets, softcap=0.0)),
        ("targets must be int64", lambda: linear_cross_entropy(hidden, weight, targets.int())),
        ("targets must be int64", lambda: linear_cross_entropy(hidden, weight, targets[:2])),
        ("from 0 to 4 or -100, not 5 at 0", lambda: linear_cross_entropy(hidden, weight, targets + 5)),
        ("not -1 at 0", lambda: linear_cross_entropy(hidden, weight, targets - 1)),
        ("ids must be int32 or int64", lambda: linear_kl(hidden, weight, ids.float(), logits, norm)),
        ("ids must be int32 or int64", lambda: linear_kl(hidden, weight, ids[:2], logits, norm)),
        ("ids must be from 1 to 5", lambda: linear_kl(hidden, weight, ids[:, :0], logits[:, :0], norm)),
        ("ids must be from 1 to 1 ", lambda: linear_kl(hidden, weight[:1], ids, logits, norm)),
        ("logits must be", lambda: linear_kl(hidden, weight, ids, logits[:, :1], norm)),
        ("log_sum_exp must be", lambda: linear_kl(hidden, weight, ids, logits, norm.long())),
        ("ids must be from 0 to 4", lambda: linear_kl(hidden, weight, ids + 4, logits, norm)),
        ("twice", lambda: linear_kl(hidden, weight, ids * 0, logits, norm)),
    ]


@pytest.mark.parametrize(("message", "call"), _refused())
def test_other_operands_are_refused(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()
