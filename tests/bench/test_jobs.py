"""The peers that ops are timed beside compute what the ops do."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from rewright.kernels.admm_step import admm_step
from rewright.kernels.bitmask import pack_bitmask
from rewright.kernels.clip_search import clip_search
from rewright.kernels.descend import descend
from rewright.kernels.select import keep_of
from tests.bench import admm_step as admm_step_bench
from tests.bench import bitmask as bitmask_bench
from tests.bench import clip_search as clip_search_bench
from tests.bench import descend as descend_bench
from tests.bench import harness, head_memory, linear_cross_entropy, linear_kl
from tests.bench import select as select_bench
from tests.kernels.conform import wanted


def test_the_peers_of_the_ops_that_choose_compute_the_same() -> None:
    generator = torch.Generator().manual_seed(4)
    weight, target, dual = torch.randn(3, 24, 37, generator=generator).unbind(0)
    keep = torch.rand(24, 37, generator=generator) > 0.5
    importance = torch.rand(24, generator=generator)
    grid = clip_search(
        weight.t(), keep.t(), importance, bits=4, symmetric=True, shares=clip_search_bench.SHARES, stored=torch.bfloat16
    )
    assert torch.equal(clip_search_bench.eager(weight, keep, importance, 4, clip_search_bench.SHARES), grid.scale)

    hessian = torch.randn(60, 24, generator=generator)
    hessian = hessian.t() @ hessian / 60
    given = weight.t(), target.t(), hessian, grid.scale
    codes, value = descend_bench.eager(*given, keep.t(), -8, 7)
    descent = descend(*given, keep=keep.t(), low=-8, high=7)
    assert torch.equal(codes, descent.codes)
    assert torch.equal(value, descent.dequantised)

    mine, theirs = dual.clone(), dual.clone()
    rhs = admm_step(target, weight, mine, keep)
    assert torch.allclose(admm_step_bench.eager(target, weight, theirs, keep), rhs, atol=1e-6)
    assert torch.allclose(theirs, mine, atol=1e-6)

    score = torch.rand(8, 24, generator=generator)
    assert torch.equal(select_bench.sorted_out(score, 5, 12), keep_of(score, 5, 12))


def test_the_peers_of_the_bitmask_form_compute_the_same() -> None:
    generator = torch.Generator().manual_seed(5)
    keep = torch.rand(6, 3, 32, generator=generator).argsort(dim=2) < 16
    codes = (torch.randint(1, 8, (6, 96), generator=generator) * keep.view(6, 96)).to(torch.int8)
    packed = pack_bitmask(codes, 32, 16)
    assert all(torch.equal(*both) for both in zip(bitmask_bench.gathered(codes, 32), packed, strict=True))
    assert torch.equal(bitmask_bench.spread(*packed), codes)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_peers_of_the_losses_compute_the_same(softcap: float | None) -> None:
    hidden, weight = linear_cross_entropy.head(9, 5, 16411, "cpu")
    targets = torch.arange(9)
    for mine, theirs in (
        linear_cross_entropy.pair(targets, softcap),
        linear_kl.pair(*linear_kl.likeliest(9, 16411, "cpu"), softcap),
    ):
        assert torch.allclose(mine(hidden, weight), theirs(hidden, weight), rtol=1e-5)
        ours, other = (torch.autograd.grad(loss(hidden, weight), hidden)[0] for loss in (mine, theirs))
        assert torch.allclose(ours, other, atol=1e-5)


def test_a_loss_takes_less_memory_than_all_logits(capsys: pytest.CaptureFixture[str]) -> None:
    head_memory.main(["--tokens=1024", "--width=8", "--vocabulary=16384", "--json"])
    report = json.loads(capsys.readouterr().out)
    # torch holds three of them, the op those of 256 tokens; a process has some memory of its own
    assert report["bytes"]["plain"] > 2 * report["logits"]
    assert report["bytes"]["fused"] < report["logits"] / 2


@pytest.mark.parametrize("op", ["cross_update", "select", "bitmask"])
def test_an_op_is_timed_when_all_its_functions_conform(op: str) -> None:
    functions = harness.FUNCTIONS.get(op, (op,))
    cases = [case for case in wanted("reference", "cpu") if case.op in functions]
    assert harness.gate(op, "reference", "cpu") == len(cases) > 0
    assert all(job.moved > 0 for job in importlib.import_module(f"tests.bench.{op}").jobs("cpu"))
