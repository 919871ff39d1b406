"""The products by packed codes: equal to the decoded matrix, on wild inputs too, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewright.kernels import dispatch
from rewright.kernels.bitmask import pack_bitmask
from rewright.kernels.bitmask_w4_gemv import bitmask_w4_gemv
from rewright.kernels.pack import pack
from rewright.kernels.w4a16_gemm import reference as gemm_reference
from rewright.kernels.w4a16_gemm import w4a16_gemm, w4a16_gemm_dx
from rewright.kernels.w4a16_gemv import reference as gemv_reference
from rewright.kernels.w4a16_gemv import w4a16_gemv
from rewright.passes.packed_tensors import decode
from tests.kernels.case import laid_out, normal
from tests.kernels.packed_cases import codes_of, weight_of

HALVES = (torch.bfloat16, torch.float16)


def _matrix(seed: int, n: int, groups: int, group: int, bits: int = 4, stored: torch.dtype = torch.bfloat16) -> Any:
    generator = torch.Generator().manual_seed(seed)
    codes = codes_of(generator, n, groups * group, bits)
    scale = (torch.rand(n, groups, generator=generator) / 8).to(stored)
    zero = codes_of(generator, n, groups, bits)
    return generator, codes, {"packed": pack(codes, bits), "scale": scale, "zero": zero, "bits": bits}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from((2, 4, 8)),
    st.integers(0, 8),
    st.integers(1, 23),
    st.sampled_from(((1, 16), (3, 16), (5, 32), (2, 48), (2, 64), (3, 128), (1, 256), (2, 256), (1, 1552))),
    st.sampled_from(("rows", "columns", "slice")),
    st.integers(0, 1 << 20),
)
def test_every_product_is_that_of_the_decoded_matrix(
    bits: int, m: int, n: int, shape: tuple[int, int], layout: str, seed: int
) -> None:
    generator, _, parts = _matrix(seed, n, *shape, bits, torch.float32)
    W = weight_of(parts)
    x, bias = laid_out(normal(generator, m, shape[0] * shape[1]), layout), normal(generator, n)
    truth = torch.nn.functional.linear(x, W, bias)
    for product in (w4a16_gemv, w4a16_gemm):
        assert torch.allclose(product(x, **parts, bias=bias), truth, rtol=1e-12, atol=1e-12)
        single = product(x.float(), **parts, bias=bias)
        assert single.dtype == torch.float32
        assert torch.allclose(single.double(), truth, rtol=1e-4, atol=1e-4)
    dy = laid_out(normal(generator, m, n), layout)
    assert torch.allclose(w4a16_gemm_dx(dy, **parts), dy @ W, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 8),
    st.integers(1, 13),
    st.integers(1, 5),
    st.sampled_from((8, 16, 24, 32, 40, 64, 96, 128, 256, 1032)),
    st.floats(0, 1),
    st.sampled_from(("rows", "columns", "slice")),
    st.integers(0, 1 << 20),
)
def test_the_bitmask_product_is_that_of_the_decoded_matrix(
    m: int, n: int, groups: int, group: int, share: float, layout: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    nnz = 2 * max(1, int(share * group / 2))
    codes = codes_of(generator, n, groups * group, 4).view(n, groups, group)
    codes = codes.masked_fill(torch.rand(codes.shape, generator=generator).argsort(dim=2) >= nnz, 0)
    mask, values = pack_bitmask(codes.flatten(1), group, nnz)
    scale = torch.rand(n, groups, generator=generator)
    x = laid_out(normal(generator, m, groups * group), layout)
    truth = x @ (codes.double() * scale.double()[:, :, None]).flatten(1).t()
    assert torch.allclose(bitmask_w4_gemv(x, mask, values, scale), truth, rtol=1e-12, atol=1e-12)
    assert torch.allclose(bitmask_w4_gemv(x.float(), mask, values, scale).double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_weights_are_rounded_as_a_model_is_loaded(dtype: torch.dtype, stored: torch.dtype) -> None:
    _, codes, parts = _matrix(1, 37, 3, 32, stored=stored)
    expected = decode(codes, parts["scale"], parts["zero"], dtype)
    assert torch.equal(w4a16_gemm(torch.eye(96, dtype=dtype), **parts).t(), expected)
    assert torch.equal(w4a16_gemm_dx(torch.eye(37, dtype=dtype), **parts), expected)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_how_many_weights_are_decoded_at_a_time_changes_no_weight(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, _, parts = _matrix(2, 48, 4, 32)
    x = normal(generator, 5, 128).to(dtype)
    names = (w4a16_gemv, w4a16_gemm)
    whole = [product(x, **parts) for product in names]
    monkeypatch.setattr(gemv_reference, "BLOCK", 16 * 128)
    monkeypatch.setattr(gemm_reference, "BLOCK", 16 * 128)
    eye = torch.eye(128, dtype=dtype)
    for product, before in zip(names, whole, strict=True):
        assert torch.allclose(product(x, **parts), before, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)
        assert torch.equal(product(eye[:8], **parts), product(eye[:8], **parts))


def test_a_row_of_a_few_yields_what_it_yields_alone() -> None:
    generator, _, parts = _matrix(6, 48, 4, 32)
    x = normal(generator, 8, 128).bfloat16()
    together = w4a16_gemv(x, **parts)
    assert all(torch.equal(w4a16_gemv(row[None], **parts)[0], own) for row, own in zip(x, together, strict=True))


def test_a_gradient_reaches_x_and_bias_and_nothing_else() -> None:
    generator, _, parts = _matrix(3, 7, 2, 16)
    x = normal(generator, 3, 32).requires_grad_()
    bias = normal(generator, 7).requires_grad_()
    parts["scale"] = parts["scale"].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: w4a16_gemm(a, **parts, bias=b), (x, bias))
    torch.autograd.backward(w4a16_gemm(x, **parts, bias=bias).sum())
    assert x.grad is not None
    assert bias.grad is not None
    assert parts["scale"].grad is None
    assert not w4a16_gemv(x, **parts, bias=bias).requires_grad


def test_the_gradient_runs_where_the_product_ran() -> None:
    generator, _, parts = _matrix(4, 7, 2, 16)
    x = normal(generator, 3, 32).float().requires_grad_()
    dispatch.reset_tally()
    with dispatch.use("reference"):
        y = w4a16_gemm(x, **parts)
    with dispatch.use("triton"):
        torch.autograd.backward(y.sum())
    counts = {"triton": 0, "reference": 1}
    assert dispatch.tally() == {"w4a16_gemm": counts, "w4a16_gemm_dx": counts}


def _refused() -> list[tuple[str, Callable[[], object]]]:
    _, _, parts = _matrix(5, 4, 2, 16)
    x, packed, scale = torch.zeros(2, 32), parts["packed"], parts["scale"]
    mask, values = torch.zeros(4, 2, 4, dtype=torch.uint8), torch.zeros(4, 2, 8, dtype=torch.uint8)
    return [
        ("at most 8 rows", lambda: w4a16_gemv(torch.zeros(9, 32), packed, scale)),
        ("at most 8 rows", lambda: bitmask_w4_gemv(torch.zeros(9, 64), mask, values, scale)),
        ("x must be", lambda: w4a16_gemm(torch.zeros(32), packed, scale)),
        ("x must be", lambda: w4a16_gemm(torch.zeros(2, 32, dtype=torch.int32), packed, scale)),
        ("int32 rows of 5 words", lambda: w4a16_gemm(torch.zeros(2, 40), packed, scale)),
        ("int32 rows of 4.5 words", lambda: w4a16_gemm(torch.zeros(2, 36), packed, scale)),
        ("not of 3", lambda: w4a16_gemm(x, packed, scale, bits=3)),
        ("3 groups", lambda: w4a16_gemm(x, packed, torch.zeros(4, 3))),
        ("in 0 groups", lambda: w4a16_gemm(x, packed, torch.zeros(4, 0))),
        ("scale must be", lambda: w4a16_gemm(x, packed, torch.zeros(3, 2))),
        ("zero must be", lambda: w4a16_gemm(x, packed, scale, torch.zeros(4, 2))),
        ("bias must be", lambda: w4a16_gemm(x, packed, scale, bias=torch.zeros(3))),
        (r"dy must be \(M, 4\)", lambda: w4a16_gemm_dx(torch.zeros(2, 5), packed, scale)),
        ("dy must be", lambda: w4a16_gemm_dx(torch.zeros(4), packed, scale)),
        ("not of 0", lambda: w4a16_gemm_dx(torch.zeros(2, 4), packed, scale, bits=0)),
        ("mask and values", lambda: bitmask_w4_gemv(torch.zeros(2, 64), mask.int(), values, scale)),
        ("mask and values", lambda: bitmask_w4_gemv(torch.zeros(2, 64), mask[0], values, scale)),
        ("bytes of mask", lambda: bitmask_w4_gemv(x, mask, values, scale)),
        ("scale must be", lambda: bitmask_w4_gemv(torch.zeros(2, 64), mask, values, scale[:, :1])),
    ]


@pytest.mark.parametrize(("message", "call"), _refused())
def test_other_operands_are_refused(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()
