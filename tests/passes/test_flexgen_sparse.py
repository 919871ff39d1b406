"""`flexgen-policy-search` on checkpoints with predictors of sparsity: what is not read takes no time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewright.passes.flexgen_policy_search.hills import Problem, pair
from rewright.passes.flexgen_policy_search.machine import GIB
from rewright.passes.flexgen_policy_search.model import read
from rewright.passes.flexgen_policy_search.roofline import Setting, Work, terms, union_read
from rewright.passes.flexgen_policy_search.shape import Model, Sparsity
from rewright.passes.spec import Layout
from tests.passes.flexing import flexgen, machine, opt, policy, settings
from tests.passes.sparsifying import STORIES, train

SETTING = Setting(None, 16, "gpu", "gpu", "zigzag")


def trained(options: dict[str, Any] | None = None, *after: dict[str, Any], **metrics: Any) -> Layout:
    """OPT-6.7B's headers with a ReLU, as predictors' stamp would stand beside them."""
    stage = {"pass": "dejavu-predictor-train", "options": options or {}, "metrics": metrics or None}
    layout = opt("6.7b")
    return replace(layout, config={**layout.config, "activation_function": "relu"}, made=(stage, *after))


def test_a_step_of_several_tokens_reads_their_union() -> None:
    known = Sparsity(0.1, 4, 0)
    assert union_read(known, np.array([1.0, 2.0, 4.0, 5.0])) == pytest.approx([0.1, 0.19, 0.3439, 1.0])


def test_bytes_of_a_step_are_those_that_are_read() -> None:
    model = read(trained(density=0.1, predictor_share=0.02))
    layers, hidden, ffn = 32, 4096, 16384
    neurons = layers * 2 * hidden * ffn * 2
    assert sum(unit.nbytes * unit.count for unit in model.units if unit.sparse) == neurons + layers * 2 * (hidden + ffn)
    assert model.sparsity is not None
    assert model.sparsity.nbytes == pytest.approx(0.02 * neurons, rel=1e-3)
    # all of the time is the weights' bytes
    box = machine(64 * GIB, GIB, GIB, hbm=1e9, gpu_flops=1e18, launch_s=0.0)
    spent = {}
    for name, one in (("dense", replace(model, sparsity=None)), ("sparse", model)):
        made = terms(one, box, Work(1, 2), SETTING, np.array([1.0]), np.array([1.0]))
        decode = made.phases[1]
        weights = sum(decode.weights[at, "gpu"]["gpu"][0] * unit.count for at, unit in enumerate(one.units))
        spent[name] = decode.fixed["gpu"][0] + weights
    saved = 0.9 * (neurons + layers * 2 * (hidden + ffn)) - model.sparsity.nbytes
    assert spent["dense"] - spent["sparse"] == pytest.approx(saved / 1e9, rel=1e-6)


def test_small_batches_gain_and_large_ones_do_not() -> None:
    dense, sparse = (read(trained(**metrics)) for metrics in ({}, {"density": 0.1, "predictor_share": 0.01}))

    def decode(model: Model, batch: int) -> float:
        problem = Problem(model, machine(40 * GIB, 8 * GIB, GIB), Work(32, 32), settings())
        weights = pair(problem, SETTING, batch, 1).phases[1].weights
        return float(sum(cost["gpu"][0] for (_, tier), cost in weights.items() if tier == "gpu"))

    assert decode(sparse, 4) < 0.8 * decode(dense, 4)
    assert decode(sparse, 64) == decode(dense, 64)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"fc1", "fc2"}),
        ({"targets": "auto"}, {"fc1", "fc2"}),
        ({"targets": "mlp,heads"}, {"fc1", "fc2", "self_attn.q_proj", "self_attn.out_proj"}),
        ({"targets": "inputs"}, {"fc1", "fc2", *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out"))}),
    ],
)
def test_targets_are_what_is_read_sparsely(options: dict[str, Any], names: set[str]) -> None:
    model = read(trained(options, density=0.3, predictor_share=0.0))
    pieces = [name for unit in model.units if unit.sparse for piece in unit.pieces for name in piece.tensors]
    assert {name.split(".", 4)[4].rpartition(".")[0] for name in pieces} == names


def test_buckets_say_how_many_rows() -> None:
    found = read(trained({"batch-buckets": "1,4"}, density=0.3, predictor_share=0.0)).sparsity
    assert found is not None
    assert found.rows == 4


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        (trained(), ["predictors that are yet to be trained are not counted: what they leave unread is not known"]),
        (trained(density="much", predictor_share=0.1), ["predictors are attached, and their stamp does not say"]),
        (trained(density=7.0, predictor_share=0.1), ["predictors are attached, and their stamp does not say"]),
        # other weights have no predictors
        (trained({}, {"pass": "compress", "options": {}}, density=0.1, predictor_share=0.1), []),
    ],
)
def test_what_is_not_known_is_counted_densely(layout: Layout, told: list[str]) -> None:
    model = read(layout)
    assert model.sparsity is None
    assert len(model.notes) == len(told)
    assert all(word in note for word, note in zip(told, model.notes, strict=True))


def test_prompts_do_not_matter() -> None:
    model = read(trained({}, {"pass": "prompt", "options": {}}, density=0.1, predictor_share=0.1))
    assert model.sparsity is not None


def test_predictors_that_were_trained(tmp_path: Path, text: Path) -> None:
    metrics = train(STORIES, tmp_path / "sparse", text)["metrics"]
    flexgen(tmp_path / "sparse", tmp_path / "out")
    found = policy(tmp_path / "out")
    known = found["checkpoint"]["sparsity"]
    assert known["share"] == pytest.approx(metrics["density"])
    assert known["rows"] == 16
    assert known["nbytes"] > 0
    assert any("of what predictors know" in note for note in found["notes"])
    flexgen(STORIES, tmp_path / "dense")
    assert policy(tmp_path / "dense")["checkpoint"]["sparsity"] is None
