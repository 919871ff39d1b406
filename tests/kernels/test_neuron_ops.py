"""The ops on predicted neurons against plain arithmetic, written apart; `test_conform` does the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rewright.kernels.dispatch import KernelError, use
from rewright.kernels.predictor_in import predictor_in
from rewright.kernels.predictor_out import active_neurons, predictor_out
from rewright.kernels.reduce_add import reduce_add
from rewright.kernels.sparse_mlp import break_even, empty_partial, sparse_mlp, worth_asking
from rewright.kernels.thresholded_linear import thresholded_linear
from tests.bench import predictor_out as out_bench
from tests.bench import reduce_add as reduce_bench
from tests.bench import sparse_decode
from tests.bench import sparse_mlp as mlp_bench
from tests.kernels.case import normal
from tests.kernels.neuron_cases import lists_of

WIDTH, NEURONS = 24, 301


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def _matrices(count: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = _generator()
    return [(normal(generator, NEURONS, WIDTH) / WIDTH**0.5).to(dtype) for _ in range(count)]


def test_a_neuron_is_listed_where_any_row_lets_it_through() -> None:
    generator = _generator()
    t, b, c = normal(generator, 3, 7), normal(generator, NEURONS, 7), normal(generator, NEURONS) - 2
    for shift in (0.0, 0.25, torch.tensor(-0.25, dtype=torch.float64)):
        alone = [predictor_out(row[None], b, c, shift) for row in t]
        index, count = predictor_out(t, b, c, shift)
        listed: list[int] = []
        for block in range(3):
            union = {int(i) for one, many in alone for i in one[block, : int(many[block])]}
            assert index[block, : int(count[block])].tolist() == sorted(union)
            assert (index[block, int(count[block]) :] == -1).all()
            listed += sorted(union)
        scores = t @ b.t() + c + shift
        assert listed == [i for i in range(NEURONS) if bool((scores[:, i] > 0).any())]
        assert active_neurons(t, b, c, shift).tolist() == listed
        assert 0 < len(listed) < NEURONS


def test_codes_are_multiplied_by_the_scale_of_their_row() -> None:
    generator = _generator()
    codes = torch.randint(-127, 128, (NEURONS, WIDTH), generator=generator).to(torch.int8)
    scale, offset = torch.rand(NEURONS, generator=generator), torch.randn(NEURONS, generator=generator)
    x = normal(generator, 2, WIDTH)
    truth = x @ (codes.double() * scale.double()[:, None]).t() + offset.double()
    assert torch.allclose(predictor_in(x, codes, offset, scale), truth)
    _, count = predictor_out(x, codes, offset, 0.0, scale)
    assert torch.equal(count, lists_of((truth > 0).any(dim=0))[1])
    assert predictor_in(x.half(), codes, offset, scale).dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("gated", [False, True])
def test_the_listed_neurons_of_an_mlp(rows: int, activation: str, gated: bool) -> None:
    up, down, gate = _matrices(3)
    generator = _generator()
    x, bias, gate_bias, offset = normal(generator, rows, WIDTH), *normal(generator, 3, NEURONS)
    active = torch.rand(NEURONS, generator=generator) < 0.3
    index, count = lists_of(active)
    first = x @ gate.t() + gate_bias if gated else x @ up.t() + bias
    h = first.relu() ** (2 if activation == "relu2" else 1)
    h = h * (x @ up.t() + bias) if gated else h
    truth = ((h - offset) * active) @ down
    more = {"gate": gate, "gate_bias": gate_bias} if gated else {}
    found = sparse_mlp(x, up, down, bias, index, count, activation, **more, offset=offset)
    assert found.shape == (1, rows, WIDTH)
    assert torch.allclose(found[0], truth)
    listed = sparse_mlp(x, up, down, bias, active.nonzero()[:, 0], None, activation, **more, offset=offset)
    assert torch.equal(listed, found)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_neurons_give_the_dense_mlp_and_none_the_bias(rows: int, dtype: torch.dtype) -> None:
    up, down = _matrices(2, dtype)
    generator = _generator()
    x, bias, last = (normal(generator, *shape).to(dtype) for shape in ((rows, WIDTH), (NEURONS,), (WIDTH,)))
    t, b, c = torch.ones(1, 1), torch.zeros(NEURONS, 1), torch.zeros(NEURONS)
    for shift, scale in ((1.0, 1.0), (-1.0, 0.0)):
        partial = sparse_mlp(x, up, down, bias, *predictor_out(t, b, c, shift), "relu")
        y = reduce_add(partial, last, x, dtype)
        dense = (x.float() @ up.float().t() + bias.float()).relu() @ down.float()
        truth = scale * dense + last.float() + x.float()
        assert y.dtype == dtype
        assert torch.allclose(y.float(), truth, rtol=8 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_row_of_a_neuron_that_is_off_is_not_read(rows: int) -> None:
    up, down = _matrices(2)
    x = normal(_generator(), rows, WIDTH)
    off = ((x @ up.t()) <= 0).all(dim=0)
    assert 0 < int(off.sum()) < NEURONS
    down[off] = torch.nan
    everything = lists_of(torch.ones(NEURONS, dtype=torch.bool))
    assert torch.isfinite(sparse_mlp(x, up, down, None, *everything, "relu")).all()


def test_buffers_are_written_and_returned() -> None:
    up, down = _matrices(2, torch.float32)
    x, last = torch.randn(2, WIDTH), torch.randn(WIDTH)
    t = torch.full((2, NEURONS), torch.nan)
    assert predictor_in(x, up, torch.zeros(NEURONS), out=t) is t
    assert torch.allclose(t, x @ up.t(), atol=1e-5)
    lists = torch.empty((3, 128), dtype=torch.int32), torch.empty(3, dtype=torch.int32)
    found = predictor_out(x, up, torch.zeros(NEURONS), 0.0, out=lists)
    assert all(a is b for a, b in zip(found, lists, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found, predictor_out(x, up, torch.zeros(NEURONS)), strict=True))
    partial = empty_partial(x, NEURONS, 3).fill_(torch.nan)
    assert partial.shape == (3, 2, WIDTH)
    assert sparse_mlp(x, up, down, None, *lists, "relu", out=partial) is partial
    y = torch.empty(2, WIDTH)
    assert reduce_add(partial, last, None, torch.float32, out=y) is y
    assert torch.equal(y, reduce_add(sparse_mlp(x, up, down, None, *lists, "relu"), last, None, torch.float32))
    alone = torch.ones(1, 2, 3)
    assert reduce_add(alone, None, None, torch.float32).data_ptr() != alone.data_ptr()


def test_no_gradient_flows() -> None:
    up, down = (matrix.requires_grad_() for matrix in _matrices(2, torch.float32))
    x = torch.randn(1, WIDTH, requires_grad=True)
    t = predictor_in(x, up, torch.zeros(NEURONS))
    index, count = predictor_out(t, torch.randn(NEURONS, NEURONS, requires_grad=True), torch.zeros(NEURONS))
    partial = sparse_mlp(x, up, down, None, index, count, "relu")
    y = reduce_add(partial, None, x, torch.float32)
    assert not any(found.requires_grad for found in (t, partial, y))


def test_one_list_is_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewright.kernels.dispatch._obstacle", lambda _: None)
    up, down = _matrices(2, torch.float32)
    with use("triton"), pytest.raises(KernelError, match="one list"):
        sparse_mlp(torch.randn(1, WIDTH), up, down, None, torch.arange(5), None, "relu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_is_held_in_a_graph_and_waits_for_nothing() -> None:
    up, down = (matrix.cuda() for matrix in _matrices(2, torch.float32))
    a, b = torch.randn(5, WIDTH, device="cuda"), torch.randn(NEURONS, 5, device="cuda")
    x, last, c = (torch.randn(*shape, device="cuda") for shape in ((2, WIDTH), (WIDTH,), (NEURONS,)))
    shift, t, y = torch.zeros((), device="cuda"), torch.empty(2, 5, device="cuda"), torch.empty_like(x)
    lists = tuple(torch.empty(shape, dtype=torch.int32, device="cuda") for shape in ((3, 128), (3,)))
    partial = empty_partial(x, NEURONS)

    def step() -> None:
        predictor_in(x, a, last[:5], out=t)
        predictor_out(t, b, c, shift, out=(lists[0], lists[1]))
        sparse_mlp(x, up, down, None, *lists, "relu", out=partial)
        reduce_add(partial, last, x, torch.float32, out=y)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for number in (-1.0, 0.0, 100.0):
        shift.fill_(number)
        x.normal_()
        graph.replay()
        first = y.clone()
        graph.replay()
        assert torch.equal(y, first)
        with use("reference"):
            found = predictor_out(predictor_in(x, a, last[:5]), b, c, shift)
            truth = reduce_add(sparse_mlp(x, up, down, None, *found, "relu"), last, x, torch.float32)
        assert torch.allclose(y, truth, atol=1e-4)


def test_the_break_even_is_that_of_the_next_known_rows() -> None:
    assert break_even(1) == 0.55
    assert worth_asking(1) == pytest.approx(0.43)
    assert break_even(3) == break_even(16) == break_even(40)
    assert all(0 < break_even(rows) <= 1 for rows in range(1, 17))


def test_the_peers_that_are_timed_compute_the_same() -> None:
    torch.manual_seed(3)
    t, b, c = torch.randn(3, 9), torch.randn(NEURONS, 9), torch.randn(NEURONS) - 3
    assert torch.equal(out_bench.listed(t, b, c)[:, 0], active_neurons(t, b, c))
    _, count = mlp_bench.lists(NEURONS, 0.25, "cpu")
    assert 0.15 * NEURONS < int(count.sum()) < 0.35 * NEURONS
    up, down = _matrices(2, torch.float32)
    x, bias = torch.randn(2, WIDTH), torch.randn(NEURONS)
    found = sparse_mlp(x, up, down, bias, torch.arange(NEURONS), None, "relu")
    assert torch.allclose(found[0], mlp_bench.dense(x, up, down, bias), atol=1e-4)
    partial, last = torch.randn(4, 2, WIDTH), torch.randn(WIDTH)
    y = reduce_add(partial, last, x, torch.float32)
    assert torch.allclose(y, reduce_bench.summed(partial, last, x), atol=1e-5)
    block = sparse_decode.block(WIDTH, NEURONS, 5)
    for shift in (1e4, 0.0):
        every = shift > 0
        y = block.step(x[:1], shift)
        assert every == torch.allclose(y, block.dense(x[:1]), atol=1e-4)
    neurons = block.predicted(x[:1], 0.0)
    dropped = torch.ones(NEURONS, dtype=torch.bool).index_fill(0, neurons, False).nonzero()[:, 0]
    halves = block.listed(x[:1], neurons) + block.listed(x[:1], dropped) - block.last_bias
    assert torch.allclose(halves, block.dense(x[:1]), atol=1e-4)


REFUSED: list[tuple[str, Callable[..., object], dict[str, Any]]] = [
    ("x must be a floating-point matrix", predictor_in, {"x": torch.zeros(3)}),
    ("x must have at most 16 rows, not 17", predictor_in, {"x": torch.zeros(17, 4)}),
    ("a must be floating point or int8", predictor_in, {"a": torch.zeros(5, 3)}),
    ("a is torch.int8, which needs a scale", predictor_in, {"a": torch.zeros(5, 4, dtype=torch.int8)}),
    ("a is torch.float32, which has no scale", predictor_in, {"a_scale": torch.zeros(5)}),
    ("a0 must be floating point", predictor_in, {"a0": torch.zeros(4)}),
    ("out must be contiguous", predictor_in, {"out": torch.zeros(1, 5).double()}),
    ("shift must be one", predictor_out, {"shift": torch.zeros(1)}),
    ("c must be floating point", predictor_out, {"c": torch.zeros(5, dtype=torch.int32)}),
    ("count must be contiguous", predictor_out, {"out": (torch.zeros(1, 128, dtype=torch.int32), torch.zeros(1))}),
    ("up must be floating point", sparse_mlp, {"up": torch.zeros(5, 3)}),
    ("down must be floating point", sparse_mlp, {"down": torch.zeros(4, 5)}),
    ("gate must be floating point", sparse_mlp, {"gate": torch.zeros(6, 4)}),
    ("offset must be floating point", sparse_mlp, {"offset": torch.zeros(4)}),
    ("there is a gate_bias, and no gate", sparse_mlp, {"gate_bias": torch.zeros(5)}),
    ("index must be contiguous", sparse_mlp, {"index": torch.zeros(1, 128)}),
    ("index without counts must be int64", sparse_mlp, {"count": None}),
    ("activation must be one of relu, relu2, not silu", sparse_mlp, {"activation": "silu"}),
    ("out must be torch.float32", sparse_mlp, {"out": torch.zeros(1, 1, 5)}),
    ("it must be what `empty_partial` made", sparse_mlp, {"out": torch.zeros(1, 1, 4)}),
    ("weight_t must be floating point", thresholded_linear, {"weight_t": torch.zeros(5, 4)}),
    ("threshold must be floating point", thresholded_linear, {"threshold": torch.zeros(5)}),
    ("x must have at most 16 rows", thresholded_linear, {"x": torch.zeros(17, 4)}),
    ("out must be contiguous torch.float32", thresholded_linear, {"out": torch.zeros(1, 5)}),
    ("partial must be", reduce_add, {"partial": torch.zeros(2, 3)}),
    ("of strides", reduce_add, {"partial": torch.zeros(2, 1, 8)[..., ::2]}),
    ("residual must be", reduce_add, {"residual": torch.zeros(4)}),
    ("dtype must be floating point", reduce_add, {"dtype": torch.int8}),
]


@pytest.mark.parametrize(("text", "op", "wrong"), REFUSED, ids=[text for text, _, _ in REFUSED])
def test_wrong_operands_are_refused(text: str, op: Callable[..., object], wrong: dict[str, Any]) -> None:
    given: dict[Callable[..., object], dict[str, Any]] = {
        predictor_in: {"x": torch.zeros(1, 4), "a": torch.zeros(5, 4), "a0": torch.zeros(5)},
        predictor_out: {"t": torch.zeros(1, 4), "b": torch.zeros(5, 4), "c": torch.zeros(5)},
        sparse_mlp: {
            "x": torch.zeros(1, 4),
            "up": torch.zeros(5, 4),
            "down": torch.zeros(5, 4),
            "bias": None,
            "index": torch.zeros(1, 128, dtype=torch.int32),
            "count": torch.zeros(1, dtype=torch.int32),
            "activation": "relu",
        },
        thresholded_linear: {"x": torch.zeros(1, 4), "weight_t": torch.zeros(4, 5), "threshold": torch.zeros(4)},
        reduce_add: {"partial": torch.zeros(2, 1, 4), "bias": None, "residual": None, "dtype": torch.float32},
    }
    op(**given[op])
    with pytest.raises(ValueError, match=text):
        op(**(given[op] | wrong))
