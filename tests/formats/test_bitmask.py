"""The bitmask form on paper: shapes, the config that says them, and configs that cannot be meant."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewright.formats.bitmask import METHOD, Bitmask, bitmask_specs, parse, quantization_config
from rewright.formats.errors import FormatError

HALF = Bitmask(128, 64)
NAMES = st.text("abc.0", min_size=1, max_size=6)
RECORDS = st.integers(1, 6).flatmap(
    lambda n: st.builds(Bitmask, st.just(8 * n), st.integers(1, 4 * n).map(lambda k: 2 * k))
)


def test_shapes_of_a_matrix() -> None:
    found = {spec.name: (spec.dtype, spec.shape) for spec in bitmask_specs("m", (6, 256), HALF, "BF16")}
    assert found == {
        "m.weight_mask": ("U8", (6, 2, 16)),
        "m.weight": ("U8", (6, 2, 32)),
        "m.weight_scale": ("BF16", (6, 2)),
        "m.weight_shape": ("I64", (2,)),
    }


def test_half_a_matrix_takes_three_bits_and_an_eighth() -> None:
    specs = bitmask_specs("m", (512, 1024), HALF, "F16")
    assert 8 * sum(spec.nbytes for spec in specs[:3]) / (512 * 1024) == 3.125


@pytest.mark.parametrize(
    ("shape", "record", "dtype", "said"),
    [
        ((4, 4, 128), HALF, "BF16", "only matrices"),
        ((4, 128), HALF, "F32", "F16 or BF16"),
        ((4, 192), HALF, "BF16", "do not divide 192"),
        ((4, 24), Bitmask(12, 6), "BF16", "whole bytes of mask"),
        ((4, 24), Bitmask(0, 6), "BF16", "whole bytes of mask"),
        ((4, 24), Bitmask(8, 3), "BF16", "whole bytes of codes"),
        ((4, 24), Bitmask(8, 10), "BF16", "whole bytes of codes"),
    ],
)
def test_what_cannot_be_stored(shape: tuple[int, ...], record: Bitmask, dtype: str, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        bitmask_specs("m", shape, record, dtype)


@given(st.dictionaries(NAMES, RECORDS, min_size=1), st.lists(NAMES))
def test_a_config_says_what_it_was_made_of(modules: dict[str, Bitmask], ignored: list[str]) -> None:
    ignored = [name for name in ignored if name not in modules]
    read = parse({"quantization_config": quantization_config(modules, ignored)})
    assert read is not None
    assert {name: read.of(name) for name in modules} == modules
    assert [name for name in ignored if read.of(name) is not None] == []


def test_the_commonest_record_is_said_once() -> None:
    modules = {"a": HALF, "b": Bitmask(32, 16), "c": HALF}
    assert quantization_config(modules, ["lm_head", "lm_head"]) == {
        "quant_method": METHOD,
        "format": "bitmask-w4",
        "group_size": 128,
        "nnz": 64,
        "modules": {"b": {"group_size": 32, "nnz": 16}},
        "ignore": ["lm_head"],
    }
    with pytest.raises(FormatError, match="no quantised module"):
        quantization_config({}, [])


def stated(**changes: Any) -> dict[str, Any]:
    return {"quantization_config": quantization_config({"m": HALF}, ["lm_head"]) | changes}


@pytest.mark.parametrize(
    "config", [{}, {"quantization_config": None}, {"quantization_config": [1]}, stated(quant_method="gptq")]
)
def test_configs_of_something_else(config: dict[str, Any]) -> None:
    assert parse(config) is None


def test_keys_that_are_not_known_are_left_alone_and_a_text_config_is_looked_into() -> None:
    assert parse(stated(x=1)) == parse({"text_config": stated()})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"group_size": None}, "`group_size` `None`"),
        ({"group_size": "128"}, "`group_size` `128`"),
        ({"group_size": 128.0}, "`group_size`"),
        ({"nnz": True}, "`nnz` `True`"),
        ({"group_size": -8}, "`group_size` `-8`"),
        ({"group_size": 100}, "groups of 100"),
        ({"nnz": 0}, "`nnz` `0`"),
        ({"nnz": 63}, "63 weights of 128"),
        ({"nnz": 130}, "130 weights of 128"),
        ({"nnz": 10**400}, "`nnz` `1000"),
        ({"format": "bitmask-w2"}, "`bitmask-w2`"),
        ({"format": None}, "`None`"),
        ({"ignore": "lm_head"}, "no list of names"),
        ({"ignore": [1]}, "no list of names"),
        ({"modules": []}, "no object"),
        ({"modules": {"a\nb": 3}}, r"module `a\?b`"),
        ({"modules": {"a": {"group_size": 8}}}, "`nnz` `None`"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_that_cannot_be_meant(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(FormatError, match=said) as refusal:
        parse(stated(**changes))
    assert "\n" not in refusal.value.message
    assert len(refusal.value.message) < 400
