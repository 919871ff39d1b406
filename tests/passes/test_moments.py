"""What the moments of a walk say of two streams, against plain transformers on the same tokens; targets from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rewright.formats.checkpoint import Checkpoint
from rewright.passes.compress import statistics, target
from rewright.passes.compress.plan import Matrix, draw_up
from rewright.passes.compress.statistics import Moments, SharedInput
from rewright.passes.layer import Layer
from rewright.passes.loading import Assembly
from rewright.passes.spec import Layout
from rewright.passes.walk import Walk
from tests.passes.problems import matrices, options

CPU = torch.device("cpu")
SAMPLES = 24
TOKENS = torch.randint(3, 512, (28, 40), generator=torch.Generator().manual_seed(3))
HELD_OUT = slice(SAMPLES, len(TOKENS))


@dataclass(frozen=True)
class Met:
    """A matrix's inputs and outputs in a model, and what its output is added to, all (tokens, width)."""

    inputs: torch.Tensor
    outputs: torch.Tensor
    before: torch.Tensor | None


@dataclass(frozen=True)
class Midway:
    """A tiny model in the second layer of a walk whose first was changed."""

    path: Path
    layer: Layer
    matrices: dict[str, Matrix]
    changed: dict[str, torch.Tensor]
    writers: tuple[str, ...]

    def weight(self, name: str) -> torch.Tensor:
        return Checkpoint.open(self.path).read(self.matrices[name].name)

    def put(self, name: str, weight: torch.Tensor) -> None:
        """Another matrix in the compressed stream."""
        self.layer.replace(name, weight)
        self.changed[f"{self.layer.name}.{name}.weight"] = weight

    def groups(self) -> list[tuple[Matrix, ...]]:
        return [tuple(self.matrices[path] for path in paths) for stage in self.layer.stages() for paths in stage]

    def gather(self, **said: Any) -> dict[str, SharedInput]:
        found = statistics.gather(self.layer, self.groups(), writers=self.writers, **said)
        return {matrix.local: shared for shared in found for matrix in shared.matrices}

    def met(self, rows: slice, *, dense: bool) -> dict[str, Met]:
        """The same by plain transformers."""
        model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()
        model.load_state_dict({} if dense else self.changed, strict=False)
        module = model.get_submodule(self.layer.name)
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name in ("", *self.matrices):
            module.get_submodule(name).register_forward_hook(_note(seen, name), with_kwargs=True)
        with torch.no_grad():
            model(input_ids=TOKENS[rows], use_cache=False)
        befores = {self.writers[0]: seen[""][0], self.writers[-1]: seen[""][1] - seen[self.writers[-1]][1]}
        return {name: Met(*seen[name], befores.get(name)) for name in self.matrices}


def _note(seen: dict[str, tuple[torch.Tensor, torch.Tensor]], name: str) -> Callable[..., None]:
    def hook(module: object, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        pair = args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output
        seen[name] = tuple(tensor.reshape(-1, tensor.shape[-1]) for tensor in pair)  # type: ignore[assignment]  # two

    return hook


def midway(path: Path) -> Midway:
    source = Checkpoint.open(path)
    layout = Layout({name: (e.dtype, tuple(e.shape)) for name, e in source.entries.items()}, source.config or {})
    plan = draw_up(options(format="dense"), layout)
    walk = Walk(Assembly(source, torch.float32, CPU), TOKENS, samples=SAMPLES, dense_from=0)
    layers = iter(walk)
    first = next(layers)
    changed: dict[str, torch.Tensor] = {}
    draws = torch.Generator().manual_seed(1)
    for matrix in plan.of_layer(0):
        weight = first.weight(matrix.local)
        noisy = weight + 0.3 * weight.std() * torch.randn(weight.shape, generator=draws)
        first.replace(matrix.local, noisy)
        changed[f"{first.name}.{matrix.local}.weight"] = noisy
    matrices = {matrix.local: matrix for matrix in plan.of_layer(1)}
    writers = plan.family.writes(source.config or {})
    return Midway(path, next(layers), matrices, changed, writers)


@pytest.fixture(params=["llama", "opt", "gpt_neox"])
def case(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Midway:
    """OPT has biases everywhere; GPT-NeoX's two writers add to one stream side by side."""
    return midway(tiny(request.param))


def _lost(case: Midway, name: str, ours: Met, dense: Met, weight: torch.Tensor, result: torch.Tensor) -> float:
    """|W x' + gap - Q x|^2 / |W x'|^2 token by token, in float64."""
    aim = dense.inputs.double() @ weight.double().t()
    size = float(aim.square().sum())
    if name in case.writers:
        assert dense.before is not None
        assert ours.before is not None
        aim = aim + dense.before.double() - ours.before.double()
    return float((aim - ours.inputs.double() @ result.double().t()).square().sum()) / size


def _coarse(weight: torch.Tensor) -> torch.Tensor:
    """A matrix that has lost something."""
    step = weight.abs().amax() / 4
    return (weight / step).round() * step


def _told(moments: Moments | None, matrix: Matrix, weight: torch.Tensor, result: torch.Tensor) -> float | None:
    """A matrix's error, whole and from two parts of its rows, which must agree."""
    found = []
    for cuts in ([(0, len(weight))], [(0, 2), (2, len(weight))]):
        parts = [(matrix.cut(first, stop), slice(first, stop)) for first, stop in cuts]
        terms = [statistics.error_terms(moments, part, weight[rows], result[rows]) for part, rows in parts]
        found.append(statistics.error(moments, matrix.name, terms))
    whole, apart = found
    assert whole == (apart if apart is None else pytest.approx(apart, rel=1e-3, abs=1e-9))
    return whole


@pytest.mark.parametrize("replaced", [False, True], ids=["as stored", "replaced"])
def test_error_against_the_dense_model_is_that_of_every_token(case: Midway, replaced: bool) -> None:
    """Also where the compressed stream runs with matrices of the layer that were replaced already, as tuning does."""
    weights = {matrix.name: case.weight(path) for path, matrix in case.matrices.items()}
    if replaced:
        for path, matrix in case.matrices.items():
            case.put(path, _coarse(weights[matrix.name]) * 0.9)
    found = case.gather(dense=True, weights=weights if replaced else None)
    ours, dense = (case.met(HELD_OUT, dense=one) for one in (False, True))
    for path, matrix in case.matrices.items():
        weight = weights[matrix.name]
        for result in (weight, _coarse(weight)):
            told = _told(found[path].held_out, matrix, weight, result)
            expected = _lost(case, path, ours[path], dense[path], weight, result)
            assert told == pytest.approx(expected, rel=2e-3), path


def test_error_on_a_matrix_s_own_inputs(case: Midway) -> None:
    found, ours = case.gather(dense=False), case.met(HELD_OUT, dense=False)
    for path, matrix in case.matrices.items():
        weight = case.weight(path)
        inputs = ours[path].inputs.double()
        lost = inputs @ (weight - _coarse(weight)).double().t()
        expected = float(lost.square().sum() / (inputs @ weight.double().t()).square().sum())
        assert _told(found[path].held_out, matrix, weight, _coarse(weight)) == pytest.approx(expected, rel=1e-3)
        assert _told(found[path].held_out, matrix, weight, weight) == 0
        assert found[path].own.tokens == SAMPLES * TOKENS.shape[1]


def test_moments_are_means_over_the_calibration_s_tokens(case: Midway) -> None:
    found = case.gather(dense=True)
    rows = slice(0, SAMPLES)
    ours, dense = (case.met(rows, dense=one) for one in (False, True))
    for path in case.matrices:
        own, inputs = found[path].own, ours[path].inputs.double()
        assert own.hessian is not None
        assert own.drift is not None
        hessian = inputs.t() @ inputs / len(inputs)
        assert torch.allclose(own.hessian.double(), hessian, rtol=1e-4, atol=1e-5 * float(hessian.abs().max()))
        moved = dense[path].inputs.double() - inputs
        if own.writes:
            assert path in case.writers
            assert dense[path].before is not None
            assert ours[path].before is not None
            gap = dense[path].before.double() - ours[path].before.double()  # type: ignore[union-attr]  # asserted
            moved = moved @ case.weight(path).double().t() + gap
        drift = moved.t() @ inputs / len(inputs)
        assert torch.allclose(own.drift.double(), drift, rtol=1e-3, atol=1e-4 * float(drift.abs().max()))


def test_the_target_is_the_least_squares_fit(case: Midway) -> None:
    """On the tokens themselves: min |t - (W' - W) x|^2 / N + damp mean(diag H) |W' - W|^2, solved in float64."""
    found = case.gather(dense=True)
    ours, dense = (case.met(slice(0, SAMPLES), dense=one) for one in (False, True))
    for path in case.matrices:
        weight, own, inputs = case.weight(path), found[path].own, ours[path].inputs.double()
        (fitted,) = target.fit([weight], own, [slice(0, len(weight))], path)
        parts = [slice(0, 3), slice(3, len(weight))]
        apart = target.fit([weight[rows] for rows in parts], own, parts, path)
        assert torch.allclose(torch.cat(apart), fitted, atol=1e-5)
        damp = 0.05 + 5 * inputs.shape[1] / len(inputs)
        pull = (damp * inputs.square().mean()).sqrt()
        size = len(inputs) ** 0.5
        aim = (dense[path].inputs.double() - inputs) @ weight.double().t()
        if path in case.writers:
            aim = aim + dense[path].before.double() - ours[path].before.double()  # type: ignore[union-attr]  # writers
        left = torch.cat([inputs / size, pull * torch.eye(inputs.shape[1], dtype=torch.float64)])
        right = torch.cat([aim / size, torch.zeros(inputs.shape[1], aim.shape[1], dtype=torch.float64)])
        exact = torch.linalg.lstsq(left, right).solution.t()
        gap = float((fitted - weight - exact).norm() / exact.norm())
        assert gap < 1e-3, path
        # and it is worth it on other tokens
        before, after = (_told(found[path].held_out, case.matrices[path], weight, one) for one in (weight, fitted))
        assert before is not None
        assert after is not None
        assert after < 0.95 * before


def test_no_drift_is_nothing_to_make_good() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    rows = [slice(0, 4)]
    for moments in (Moments(3, torch.eye(6)), Moments(3, torch.zeros(6, 6), torch.zeros(6, 6))):
        assert target.fit([weight], moments, rows, "w")[0] is weight
    still = Moments(3, torch.eye(6), torch.zeros(6, 6))
    assert torch.equal(target.fit([weight], still, rows, "w")[0], weight)
    (matrix,) = matrices(options(), 4, columns=6)
    for empty in (None, Moments(0, torch.eye(6))):
        assert _told(empty, matrix, weight, weight) is None
    silent = Moments(2, torch.zeros(6, 6), torch.zeros(6, 6), outputs={matrix.name: 0.0}, misses={matrix.name: 0.0})
    assert _told(silent, matrix, weight, weight) is None
