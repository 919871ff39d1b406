"""What is decided from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewright.cli.describe import outline
from rewright.passes import rates
from rewright.passes.compress import admm, budget, cost, polish, tune
from rewright.passes.compress.plan import draw_up, estimate, fit_group, specs
from rewright.passes.compress.spec import CompressOptions
from rewright.passes.errors import InputError, UsageError
from rewright.passes.run_options import RunOptions
from rewright.passes.spec import Layout
from rewright.passes.values import CODE_BITS, Bits, BitsFor, GroupSize, Pattern, Regex


@pytest.mark.parametrize(
    ("columns", "wanted", "found"),
    [(288, 128, 32), (576, 128, 64), (172, 32, 43), (72, 32, 36), (4096, 128, 128), (97, 32, None), (64, None, None)],
)
def test_widths(columns: int, wanted: int | None, found: int | None) -> None:
    assert fit_group(columns, wanted) == found


def test_a_size_past_any_width_is_found_at_once() -> None:
    assert fit_group(172, 10**11) is None


@given(st.integers(1, 5000), st.integers(1, 512))
def test_any_width_gets_a_group_that_divides_it(columns: int, wanted: int) -> None:
    found = fit_group(columns, wanted)
    assert found is None or columns % found == 0
    if columns % wanted == 0:
        assert found == wanted
    if found is None:
        assert not any(columns % size == 0 for size in range(-(-wanted // 2), 2 * wanted + 1))


def layout(**config: object) -> Layout:
    tensors = {
        "model.embed_tokens.weight": ("BF16", (100, 64)),
        "model.layers.0.self_attn.q_proj.weight": ("BF16", (64, 64)),
        "model.layers.0.mlp.down_proj.weight": ("BF16", (64, 172)),
        "model.layers.0.input_layernorm.weight": ("F32", (64,)),
        "model.layers.0.rotary.inv_freq": ("F32", (8, 8)),
        "lm_head.weight": ("BF16", (100, 64)),
    }
    return Layout(tensors, {"model_type": "llama", "max_position_embeddings": 128, **config})


def rtn(**said: object) -> CompressOptions:
    return CompressOptions(method="rtn", **said)  # type: ignore[arg-type]


def test_only_matrices_of_layers_are_planned() -> None:
    said = rtn(group_size=GroupSize(32))
    plan = draw_up(said, layout())
    assert [(m.module, m.group) for m in plan.matrices] == [
        ("model.layers.0.self_attn.q_proj", 32),
        ("model.layers.0.mlp.down_proj", 43),
    ]
    found = {spec.name: (spec.dtype, tuple(spec.shape)) for spec in specs(plan, said, layout())}
    assert found["model.layers.0.mlp.down_proj.weight_scale"] == ("BF16", (64, 4))
    assert found["lm_head.weight"] == ("BF16", (100, 64))
    assert "model.layers.0.mlp.down_proj.weight" not in found


def test_tied_head_is_not_written_twice() -> None:
    tied = layout(tie_word_embeddings=True)
    names = {spec.name for spec in specs(draw_up(rtn(), tied), rtn(), tied)}
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names


def test_estimate_counts_the_bytes_of_the_result() -> None:
    said = rtn(group_size=GroupSize(32))
    guess = estimate(said, layout())
    # a row takes whole words: 22 of them for 172 codes of 4 bits
    packed = 64 * 64 // 2 + 64 * 2 * 2 + 16 + 64 * 22 * 4 + 64 * 4 * 2 + 16
    assert guess.output_bytes == packed + 2 * 100 * 64 * 2 + 64 * 4 + 8 * 8 * 4
    assert [row["group_size"] for row in guess.details["matrices"]] == [32, 43]
    dense = estimate(CompressOptions(bits=Bits(16), sparsity=0.5, method="rtn"), layout())
    assert dense.output_bytes == 2 * (2 * 100 * 64 + 64 * 64 + 64 * 172) + 64 * 4 + 8 * 8 * 4


def test_refusals() -> None:
    with pytest.raises(UsageError, match=r"`--pattern 3:7` does not divide the 64 columns"):
        draw_up(rtn(pattern=Pattern(3, 7)), layout())
    with pytest.raises(InputError, match="no matrix to compress"):
        draw_up(rtn(skip=(Regex("."),)), layout())
    with pytest.raises(InputError, match="`gpt5`"):
        draw_up(rtn(), layout(model_type="gpt5"))
    with pytest.raises(InputError, match="quantised already"):
        draw_up(rtn(), layout(quantization_config={"quant_method": "gptq"}))


WIDTH, INNER, KEYS, WORDS, DEPTH = 4096, 14336, 1024, 128256, 32


def eight_billion() -> Layout:
    """The headers of a Llama of 8 G weights."""
    shapes = {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (WIDTH, WIDTH)),
        **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (KEYS, WIDTH)),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (INNER, WIDTH)),
        "mlp.down_proj": (WIDTH, INNER),
    }
    tensors = {
        f"model.layers.{layer}.{name}.weight": ("BF16", shape)
        for layer in range(DEPTH)
        for name, shape in shapes.items()
    }
    outer = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), ("BF16", (WORDS, WIDTH)))
    return Layout({**outer, **tensors}, {"model_type": "llama", "max_position_embeddings": 8192})


def told(**said: Any) -> dict[str, dict[str, Any]]:
    """The steps of a run on that model, by name."""
    options = CompressOptions(calibration_text=(Path("text"),), **said)
    guess = estimate(options, eight_billion())
    parts = guess.details["parts"]
    assert guess.flops == sum(part["flops"] for part in parts)
    assert guess.bytes_moved == sum(part["bytes_moved"] for part in parts)
    assert guess.peak_device_bytes == max(part["peak_bytes"] for part in parts)
    assert guess.peak_host_bytes > guess.peak_device_bytes
    return {part["step"]: part for part in parts}


def test_steps_are_what_the_options_ask_for() -> None:
    assert list(told()) == ["read and write", "forwards", "statistics", "target", "sweep", "refine, 3 passes", "errors"]
    pruned = list(told(sparsity=0.5, budget="measured", tune=100, polish=200, refine=1))
    assert pruned == [
        *("read and write", "budget", "forwards", "statistics", "target", "zeros by ADMM", "tune, 100 steps", "sweep"),
        *("refine, 1 pass", "errors", "polish, 200 steps"),
    ]
    plain = told(target="own", mask="sweep", sparsity=0.5, refine=0)
    assert list(plain) == ["read and write", "forwards", "statistics", "sweep", "errors"]
    assert list(told(mask="keep"))[4] == "zeros by ADMM"
    assert list(told(method="wanda", sparsity=0.5))[3] == "zeros and rounding"
    assert [part["step"] for part in estimate(rtn(), layout()).details["parts"]] == [
        "read and write",
        "zeros and rounding",
    ]


def test_operations_of_a_model_of_eight_billion_weights() -> None:
    """The products, written out: 128 rows of 2048 tokens and 16 held out."""
    tokens = 144 * 2048
    inputs = (WIDTH, WIDTH, WIDTH, INNER)
    squares = sum(side**2 for side in inputs)
    cubes = sum(side**3 for side in inputs)
    fed = 2 * (WIDTH + KEYS + INNER) * WIDTH**2 + WIDTH * INNER**2
    found = told(sparsity=0.5)
    drifts = 3 * WIDTH**2 + WIDTH * INNER
    assert found["statistics"]["flops"] == 2 * tokens * DEPTH * (squares + drifts)
    assert found["sweep"]["flops"] == pytest.approx(DEPTH * (fed + 4 / 3 * cubes))
    assert found["zeros by ADMM"]["flops"] == pytest.approx(DEPTH * (62 * fed + cubes))
    assert found["refine, 3 passes"]["flops"] == pytest.approx(3 * DEPTH * 2 * fed, rel=0.05)
    weights = 2 * (WIDTH + KEYS + INNER) * WIDTH + WIDTH * INNER
    # stage by stage, the compressed stream four times and once more, the dense one four times
    prefixes = ((WIDTH + 2 * KEYS) * WIDTH, 2 * (WIDTH + KEYS) * WIDTH, weights - WIDTH * INNER, weights)
    attention = 4 * 2048 * WIDTH
    passes = 2 * (2 * sum(prefixes) + weights) + (2 * 3 + 1) * attention
    assert found["forwards"]["flops"] == tokens * DEPTH * passes
    once = told(sparsity=0.5, sequential="layer")["forwards"]["flops"]
    assert once == tokens * DEPTH * 3 * (2 * weights + attention)
    polished = told(polish=10)["polish, 10 steps"]["flops"]
    assert polished == 10 * 2048 * (3 * DEPTH * (2 * weights + attention) + 8 * WORDS * WIDTH)


@pytest.mark.parametrize("name", ["tune", "polish", "refine"])
def test_steps_add_up(name: str) -> None:
    flops = [
        next(part["flops"] for step, part in told(**{name: steps}).items() if step.startswith(name))
        for steps in (10, 20, 30)
    ]
    assert flops[2] - flops[1] == pytest.approx(flops[1] - flops[0])
    assert flops[0] < flops[1]


def test_experts_see_a_share_of_the_tokens() -> None:
    names = [f"{expert}.{part}" for expert in range(4) for part in ("gate_proj", "up_proj", "down_proj")]
    tensors = {f"model.layers.0.mlp.experts.{name}.weight": ("F32", (64, 64)) for name in names}
    tensors["model.layers.0.self_attn.q_proj.weight"] = ("F32", (64, 64))
    config = {"model_type": "qwen3_moe", "num_experts": 4, "max_position_embeddings": 128}
    options = CompressOptions(calibration_text=(Path("text"),), target="own", group_size=GroupSize(32))
    found = {
        chosen: estimate(options, Layout(tensors, {**config, "num_experts_per_tok": chosen})).details["parts"]
        for chosen in (1, 2)
    }
    tokens = 144 * 128
    for chosen, parts in found.items():
        statistics = next(part["flops"] for part in parts if part["step"] == "statistics")
        assert statistics == 2 * tokens * 64**2 * (1 + 2 * chosen), "one input into gate and up, one into down"


@pytest.mark.parametrize("asked", [2.2, 2.5, 3.5, 4.7, 7.0])
def test_an_average_is_near_what_was_asked_for(asked: float) -> None:
    options = CompressOptions(
        bits=Bits(asked), budget="measured", calibration_text=(Path("text"),), bits_for=(BitsFor(r"\.0\..*q_proj", 8),)
    )
    guess = estimate(options, eight_billion())
    packed = sum(
        4 * shape[0] * shape[1] for name, (_, shape) in guess.layout.tensors.items() if name.endswith("weight_packed")
    )
    weights = sum(shape[0] * shape[1] for name, (_, shape) in eight_billion().tensors.items() if ".layers." in name)
    said = 8 * WIDTH**2
    mean = (8 * packed - said) / (weights - WIDTH**2)
    # a word holds ten codes of 3 bits, and two bits of nothing
    assert asked - 0.02 < mean < asked + 0.4
    assert {row["bits"] for row in guess.details["matrices"]} == {asked, 8}
    assert guess.output_bytes < estimate(CompressOptions(method="rtn", bits=Bits(8)), eight_billion()).output_bytes


def test_a_dry_run_says_what_each_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_rates", lambda options: {"flops": 1e14, "bytes": 1e12})
    guess = estimate(CompressOptions(calibration_text=(Path("text"),)), eight_billion())
    seconds, details = rates.timed(guess, RunOptions())
    assert seconds == pytest.approx(sum(part["seconds_estimated"] for part in details["parts"]), abs=0.01)
    assert "seconds_estimated" not in guess.details["parts"][0]
    lines = list(outline("parts", details["parts"]))
    head, *rows = lines[1].splitlines()
    assert head.split() == ["step", "arithmetic", "bytes", "moved", "memory", "time"]
    statistics = next(row for row in rows if row.startswith("  statistics"))
    assert "6.89 PFLOP" in statistics
    assert statistics.endswith("1 min 24 s")


def test_counts_are_those_of_the_steps_themselves() -> None:
    assert admm.CHOOSING + admm.SETTLING == cost.ADMM_ITERATIONS
    assert admm.CHOOSING == cost.ADMM_SELECTIONS
    assert (tune.STEP_TOKENS, polish.STEP_TOKENS) == (cost.TUNE_TOKENS, cost.POLISH_TOKENS)
    assert budget.SEQUENCES == cost.BUDGET_SEQUENCES
    assert (len(budget.AROUND), len(CODE_BITS)) == (cost.ZEROS_TRIED, cost.BITS_TRIED)
