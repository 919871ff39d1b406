"""`compress` end to end: what it writes is what plain transformers reads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rewright.kernels.pack import unpack
from rewright.passes.errors import InputError
from rewright.passes.loading import load
from rewright.passes.pipeline import plan
from rewright.passes.recipe import make as make_stage
from rewright.passes.run_options import RunOptions
from rewright.passes.survey import Run
from tests.passes.compressing import QUICK, compress, logits, plain, report, zeros
from tests.passes.conftest import STORIES, make


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, "channel"])
def test_widths_and_bits_packed(
    bits: int, group_size: Any, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    compress(tiny("llama"), tmp_path / "out", text, bits=bits, group_size=group_size)
    assert torch.equal(plain(tmp_path / "out", dtype=torch.float32), logits(load(tmp_path / "out")[0]))


def test_asymmetric_codes_warn_and_load_decoded(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    from transformers import CompressedTensorsConfig

    _, warnings = compress(tiny("llama"), tmp_path / "out", text, symmetric=False)
    assert any("asymmetric" in warning for warning in warnings)
    ours = logits(load(tmp_path / "out", dtype=torch.bfloat16)[0])
    config = CompressedTensorsConfig(dequantize=True)
    assert torch.equal(plain(tmp_path / "out", dtype=torch.bfloat16, quantization_config=config), ours)


def test_gpt2_is_refused_packed_and_right_dense(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Conv1D") as caught:
        compress(tiny("gpt2"), tmp_path / "out", text)
    assert "--format dense" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
    compress(tiny("gpt2"), tmp_path / "out", text, format="dense")
    assert torch.equal(plain(tmp_path / "out", dtype=torch.float32), logits(load(tmp_path / "out")[0]))
    # files of the hub spell names without the base, and carry masks
    bare = tmp_path / "bare"
    shutil.copytree(tiny("gpt2"), bare)
    tensors = load_file(bare / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    compress(bare, tmp_path / "bare-out", text, format="dense")
    assert torch.equal(plain(tmp_path / "out", dtype=torch.float32), plain(tmp_path / "bare-out", dtype=torch.float32))
    # groups run along the inputs, which GPT-2 stores first: few different values in a column's group
    weight = load_file(tmp_path / "out" / "model.safetensors")["transformer.h.0.mlp.c_fc.weight"]
    assert all(len(torch.unique(weight[:16, column])) <= 16 for column in range(8))


def test_dense_format_holds_the_same_weights(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    compress(tiny("llama"), tmp_path / "packed", text)
    compress(tiny("llama"), tmp_path / "dense", text, format="dense")
    assert torch.equal(plain(tmp_path / "packed", dtype=torch.float32), plain(tmp_path / "dense", dtype=torch.float32))


def test_zeros_are_counted_exactly(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    compress(tiny("llama"), tmp_path / "prune", text, bits=16, sparsity=0.3)
    tensors = load_file(tmp_path / "prune" / "model.safetensors")
    for row in report(tmp_path / "prune")["matrices"]:
        size = row["rows"] * row["columns"]
        assert row["zeros"] == int((tensors[row["name"]] == 0).sum()) == round(0.3 * size)
    compress(tiny("llama"), tmp_path / "both", text, sparsity=0.3)
    counted = zeros(tmp_path / "both")
    for row in report(tmp_path / "both")["matrices"]:
        assert row["zeros"] == counted[row["name"] + "_packed"] >= round(0.3 * row["rows"] * row["columns"])


@pytest.mark.parametrize("method", ["gptq", "rtn", "magnitude", "wanda"])
def test_patterns_hold_after_packing(method: str, tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    compress(tiny("llama"), tmp_path / "out", text, pattern="2:4", method=method)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name in (name for name in tensors if name.endswith("_packed")):
        codes = unpack(tensors[name], 4, int(tensors[name.replace("_packed", "_shape")][1]))
        assert int((codes.view(codes.shape[0], -1, 4) != 0).sum(2).max()) <= 2


def test_width_that_no_group_divides(tmp_path: Path, text: Path) -> None:
    """Width 72 at 32 takes groups of 36, in a config group of its own; said before the work, in the report, loaded."""
    src = make("llama", tmp_path / "src", intermediate_size=72)
    stage = make_stage(1, "compress", {**QUICK, "group-size": 32, "calibration-text": [str(text)]})
    shown = plan(Run(src, tmp_path / "out", (stage,), RunOptions()))["stages"][0]["details"]["matrices"]
    sizes = {row["name"]: row["group_size"] for row in shown}
    assert sizes["model.layers.*.mlp.down_proj.weight"] == 36
    assert sizes["model.layers.*.mlp.up_proj.weight"] == 32
    assert not (tmp_path / "out").exists()
    compress(src, tmp_path / "out", text, group_size=32)
    for row in report(tmp_path / "out")["matrices"]:
        assert row["group_size"] == sizes[row["name"].replace(f".{row['layer']}.", ".*.", 1)]
    assert torch.equal(plain(tmp_path / "out", dtype=torch.float32), logits(load(tmp_path / "out")[0]))


def test_the_reported_error_is_that_of_the_decoded_weights(tmp_path: Path, text: Path) -> None:
    """In a bfloat16 model decoding rounds once more, which at 8 bits is much of the error."""
    src = make("llama", tmp_path / "src", torch.bfloat16)
    compress(src, tmp_path / "packed", text, bits=8)
    compress(src, tmp_path / "dense", text, bits=8, format="dense")
    for one, other in zip(report(tmp_path / "packed")["matrices"], report(tmp_path / "dense")["matrices"], strict=True):
        # the others' inputs differ: a packed matrix runs as it decodes, a dense one as it is written
        if re.search(r"layers\.0\.self_attn\.[qkv]_proj", one["name"]):
            assert abs(one["error_calibration"] / other["error_calibration"] - 1) < 1e-3


def test_skipped_matrices_keep_their_bytes(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    compress(tiny("llama"), tmp_path / "out", text, skip=["down_proj", r"layers\.0\."])
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny("llama"), tmp_path / "out"))
    kept = [name for name in before if name in after]
    assert "model.layers.0.self_attn.q_proj.weight" in kept
    assert "model.layers.1.mlp.down_proj.weight" in kept
    assert "model.layers.1.mlp.up_proj.weight" not in kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert torch.equal(plain(tmp_path / "out", dtype=torch.float32), logits(load(tmp_path / "out")[0]))


def test_sharded_sources_and_lines_of_json(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    """A source in shards gives the same bytes as one in a file, a .jsonl the same as its .txt."""
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).save_pretrained(
        sharded, max_shard_size="40KB"
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (sharded / name).write_bytes((tiny("llama") / name).read_bytes())
    assert len(list(sharded.glob("*.safetensors"))) > 1
    records = tmp_path / "text.jsonl"
    documents = [part.strip() for part in text.read_text().split("<|endoftext|>") if part.strip()]
    records.write_text("\n".join(json.dumps({"text": part}) for part in documents))
    compress(tiny("llama"), tmp_path / "one", text)
    compress(sharded, tmp_path / "two", records)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_every_step_of_the_method_pays_on_a_real_model(tmp_path: Path, text: Path) -> None:
    """On held-out tokens: matrix by matrix GPTQ below RTN and the joint sweep below Wanda below magnitude; after the
    layers, whose errors the dense target makes good, the defaults below all of them."""
    paper = {"target": "own", "mask": "sweep", "refine": 0}
    matrices, layers = {}, {}
    for name, options in {
        "default": {},
        "gptq": paper,
        "rtn": {"method": "rtn"},
        "pruned": {"sparsity": 0.5},
        "joint": {"sparsity": 0.5, **paper},
        "wanda": {"sparsity": 0.5, "method": "wanda"},
        "magnitude": {"sparsity": 0.5, "method": "rtn"},
    }.items():
        document, _ = compress(STORIES, tmp_path / name, text, group_size=32, samples=24, **options)
        metrics = document["stages"][0]["metrics"]
        matrices[name], layers[name] = metrics["error_held_out"], metrics["layer_error_held_out"]
    assert matrices["gptq"] < 0.8 * matrices["rtn"]
    assert matrices["joint"] < 0.8 * matrices["wanda"] < 0.8 * matrices["magnitude"]
    assert layers["default"] < 0.9 * layers["gptq"] < 0.8 * layers["rtn"]
    assert layers["pruned"] < 0.8 * min(layers[name] for name in ("joint", "wanda", "magnitude"))
