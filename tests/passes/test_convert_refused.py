"""What `convert` refuses: what a form has no room for, what is damaged, what nobody says how to read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rewright.formats.errors import Refusal
from rewright.passes.errors import InputError
from rewright.passes.pipeline import plan
from rewright.passes.recipe import parse as parse_recipe
from rewright.passes.run_options import RunOptions
from rewright.passes.survey import Run
from tests.passes.compressing import change, compress
from tests.passes.conftest import STORIES
from tests.passes.converting import DENSE, MASKED, PACKED, config, convert, forget, reconfigure
from tests.passes.outputs import beside


@pytest.mark.parametrize(
    ("said", "known", "told"),
    [
        ({"sparsity": 0.5}, True, "the model was compressed without a pattern"),
        ({}, True, "the model was compressed without a pattern"),
        ({"sparsity": 0.5}, False, r"`model\.layers\.0\.mlp\.down_proj\.weight` keeps up to 1\d of 16 weights, [789]"),
        ({"sparsity": 0.8}, False, r"`model\.layers\.0\.mlp\.down_proj\.weight` keeps up to \d+ of 16 weights, 3\."),
        ({"pattern": "8:16", "bits": 3}, False, r"`model\.layers\.0\.mlp\.down_proj\.weight_packed` .* of 3 bits"),
        (
            {"pattern": "8:16", "bits-for": ["k_proj=8"]},
            True,
            r"layers\.0\.self_attn\.k_proj\.weight_packed` .* 8 bits",
        ),
        ({"pattern": "8:16", "symmetric": False}, False, "`model.*down_proj.weight_packed` has asymmetric codes"),
        ({"pattern": "2:4", "group-size": 4}, False, "has groups of 4, which is no multiple of 8"),
    ],
    ids=str,
)
def test_what_no_record_holds(
    said: dict[str, Any], known: bool, told: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    compress(tiny("llama"), tmp_path / "p", method="rtn", **{"group-size": 16, **said})
    if not known:
        forget(tmp_path / "p")
    with pytest.raises(InputError, match=told) as refused:
        convert(tmp_path / "p", tmp_path / "out", MASKED)
    assert "--pattern" in (refused.value.hint or "")
    assert beside(tmp_path / "out") == []
    convert(tmp_path / "p", tmp_path / "out", DENSE)


def test_scales_of_32_bits_are_refused(own: Path, tmp_path: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: t.float() for name, t in tensors.items() if name.endswith("_scale")})

    change(own, widen)
    with pytest.raises(InputError, match="weight_scale` is F32, and the bitmask form holds scales of 16 bits"):
        convert(own, tmp_path / "b", MASKED)
    convert(own, tmp_path / "d", DENSE)


@pytest.mark.parametrize("to", [PACKED, MASKED])
def test_dense_has_no_codes(to: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the checkpoint is dense") as refused:
        convert(STORIES, tmp_path / "out", to)
    assert "compress" in (refused.value.hint or "")


def test_a_chain_is_refused_before_its_first_stage(tiny: Callable[[str], Path]) -> None:
    first, second = '[[stage]]\npass = "compress"\nmethod = "rtn"\n', '[[stage]]\npass = "convert"\nto = "bitmask-w4"\n'
    out = Path("/nowhere/out")
    for said in ("sparsity = 0.5\n", ""):
        stages = parse_recipe(first + said + "group-size = 16\n" + second)
        with pytest.raises(InputError, match=r"stage 2 \(convert\): the model was compressed without a pattern"):
            plan(Run(tiny("llama"), out, stages, RunOptions()))
    fits = parse_recipe(first + 'pattern = "4:16"\ngroup-size = 16\n' + second)
    document = plan(Run(tiny("llama"), out, fits, RunOptions()))
    assert document["stages"][1]["details"]["kept"] == 0.25


def _drop(tensors: dict[str, torch.Tensor], leaf: str) -> None:
    del tensors[f"model.layers.0.mlp.up_proj.{leaf}"]


def _put(tensors: dict[str, torch.Tensor], leaf: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    name = f"model.layers.0.mlp.up_proj.{leaf}"
    tensors[name] = edit(tensors[name]).contiguous()


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda t: _drop(t, "weight_scale"), r"up_proj\.weight_scale` is missing"),
        (lambda t: _drop(t, "weight_shape"), r"up_proj\.weight_shape` is missing"),
        (lambda t: _put(t, "weight_packed", lambda x: x[None]), r"up_proj\.weight_packed` has shape \[1, 64, 4\]"),
        (lambda t: _put(t, "weight_packed", lambda x: x[:, :3]), r"up_proj\.weight_packed` is I32 \[64, 3\]"),
        (lambda t: _put(t, "weight_packed", lambda x: x.float()), r"up_proj\.weight_packed` is F32 \[64, 4\]"),
        (lambda t: _put(t, "weight_scale", lambda x: x[1:]), r"up_proj\.weight_scale` is BF16 \[63, 2\]"),
        (lambda t: _put(t, "weight_shape", lambda x: x * 0 - 5), r"up_proj\.weight_shape` does not give"),
        (
            lambda t: _put(t, "weight_shape", lambda x: x.flip(0)),
            r"up_proj\.weight_packed` .* a matrix of 32 rows and 64 columns",
        ),
        (lambda t: _put(t, "weight_scale", lambda x: x / 0), r"up_proj\.weight_scale` holds values .* not finite"),
    ],
)
@pytest.mark.parametrize("to", [MASKED, DENSE])
def test_damaged_codes(
    edit: Callable[[dict[str, torch.Tensor]], None], told: str, to: str, own: Path, tmp_path: Path
) -> None:
    change(own, edit)
    with pytest.raises(InputError, match=told):
        convert(own, tmp_path / "out", to)
    assert beside(tmp_path / "out") == []


@pytest.mark.parametrize("to", [PACKED, DENSE])
def test_damaged_masks(to: str, half: Path, tmp_path: Path) -> None:
    convert(half, tmp_path / "b", MASKED)
    change(tmp_path / "b", lambda t: _put(t, "weight_mask", lambda x: x ^ 1))
    with pytest.raises(
        InputError, match=r"up_proj\.weight_mask` keeps \d+ weights in group \d+ of row \d+, and every group has 8"
    ):
        convert(tmp_path / "b", tmp_path / "out", to)


def test_a_config_that_says_too_little(own: Path, tmp_path: Path) -> None:
    reconfigure(own, lambda said: said["ignore"].append("model.layers.1.mlp.up_proj"))
    with pytest.raises(InputError, match=r"`model\.layers\.1\.mlp\.up_proj` is packed, and"):
        convert(own, tmp_path / "out", DENSE)
    found = config(own)
    del found["quantization_config"]
    (own / "config.json").write_text(json.dumps(found))
    with pytest.raises(Refusal, match="pack-quantized, without the `quantization_config`"):
        convert(own, tmp_path / "out", DENSE)
    empty = config(own) | {"quantization_config": {"quant_method": "rewright-bitmask-w4", "group_size": 16, "nnz": 8}}
    shutil.copytree(STORIES, tmp_path / "dense")
    (tmp_path / "dense" / "config.json").write_text(json.dumps(empty))
    with pytest.raises(InputError, match="says bitmask-w4, and no tensor is in that form"):
        convert(tmp_path / "dense", tmp_path / "out", DENSE)
