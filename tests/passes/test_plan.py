"""What is decided from headers alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewright.passes.compress.plan import draw_up, estimate, fit_group, specs
from rewright.passes.compress.spec import CompressOptions
from rewright.passes.errors import InputError, UsageError
from rewright.passes.spec import Layout
from rewright.passes.values import GroupSize, Pattern


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
    dense = estimate(CompressOptions(bits=16, sparsity=0.5, method="rtn"), layout())
    assert dense.output_bytes == 2 * (2 * 100 * 64 + 64 * 64 + 64 * 172) + 64 * 4 + 8 * 8 * 4


def test_refusals() -> None:
    with pytest.raises(UsageError, match=r"`--pattern 3:7` does not divide the 64 columns"):
        draw_up(rtn(pattern=Pattern(3, 7)), layout())
    with pytest.raises(InputError, match="no matrix to compress"):
        draw_up(rtn(skip=(".",)), layout())
    with pytest.raises(InputError, match="`gpt5`"):
        draw_up(rtn(), layout(model_type="gpt5"))
    with pytest.raises(InputError, match="quantised already"):
        draw_up(rtn(), layout(quantization_config={"quant_method": "gptq"}))
