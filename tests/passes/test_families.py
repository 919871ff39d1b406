"""Every family in the layer walk and in `compress`: what is written is what plain transformers runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rewright.formats.checkpoint import Checkpoint
from rewright.passes.errors import InputError
from rewright.passes.layer import Layer
from rewright.passes.loading import Assembly, load
from rewright.passes.models.families import FAMILIES, family_of
from rewright.passes.summary import summary
from rewright.passes.walk import Walk
from tests.passes.compressing import compress, logits, plain, report
from tests.passes.conftest import EXPERTS, PACKED, TINY, make

CPU = torch.device("cpu")
UNPACKED = [name for name in TINY if name not in PACKED]
WRITING = [name for name in TINY if FAMILIES[TINY[name][0]].writes(TINY[name][1])]


def walk(path: Path, **options: Any) -> Walk:
    tokens = torch.randint(3, 512, (3, 40), generator=torch.Generator().manual_seed(3))
    return Walk(Assembly(Checkpoint.open(path), torch.float32, CPU), tokens, **options)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed(name: str, dtype: torch.dtype, tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    src = tiny(name) if dtype == torch.float32 else make(name, tmp_path / "bf16", dtype)
    document, warnings = compress(src, tmp_path / "out", text, sparsity=0.25)
    assert document["state"] == "done"
    assert not warnings
    theirs, ours = plain(tmp_path / "out", dtype=dtype), logits(load(tmp_path / "out")[0])
    if name in EXPERTS and dtype == torch.float32:
        # plain transformers runs packed experts in the dtype of their scales, whatever the model's
        assert float((theirs - ours).norm() / ours.norm()) < 0.02
    else:
        assert torch.equal(theirs, ours)
    if dtype == torch.float32:
        dense = plain(src, dtype=dtype)
        assert not torch.equal(dense, ours)
        assert float((dense - ours).norm() / dense.norm()) < 0.7


@pytest.mark.parametrize("name", UNPACKED)
def test_refused_packed_and_right_dense(name: str, tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    for method in ("gptq", "rtn"):
        with pytest.raises(InputError, match="plain transformers cannot r") as caught:
            compress(tiny(name), tmp_path / "out", text, method=method)
        assert "`--format dense`" in str(caught.value.hint)
        assert not (tmp_path / "out").exists()
    _, warnings = compress(tiny(name), tmp_path / "out", text, format="dense")
    assert not warnings
    before, after = plain(tiny(name), dtype=torch.float32), plain(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(after, logits(load(tmp_path / "out")[0]))
    assert 0 < float((before - after).norm() / before.norm()) < 0.7
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize("name", TINY)
def test_pruned_only(name: str, tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    """Every family takes 16 bits in either format, with as many zeros as were asked for in each matrix."""
    compress(tiny(name), tmp_path / "out", text, bits=16, sparsity=0.25)
    assert torch.equal(plain(tmp_path / "out", dtype=torch.float32), logits(load(tmp_path / "out")[0]))
    tensors = load_file(tmp_path / "out/model.safetensors")
    for row in report(tmp_path / "out")["matrices"]:
        tensor, bracket, part = row["name"].partition("[")
        held = tensors[tensor][int(part.rstrip("]"))] if bracket else tensors[tensor]
        assert int((held == 0).sum()) == row["zeros"] == round(0.25 * held.numel())


def first_layer(walked: Walk) -> Layer:
    return next(iter(walked))


@pytest.mark.parametrize("name", WRITING)
def test_writers_add_to_the_stream(name: str, tiny: Callable[[str], Path]) -> None:
    """A layer's output less what its writers made is its input, and nothing comes between."""
    walked = walk(tiny(name), dense_from=0)
    layer = first_layer(walked)
    family = family_of(walked.assembly.weights.source.config)
    writers = [path for path in family.writes(TINY[name][1]) if path in layer.linears]
    assert writers
    for path in layer.linears:
        if "experts" in path:
            layer.replace(path, torch.zeros_like(layer.weight(path)))
    for biases in ("gate_up_proj_bias", "down_proj_bias"):
        for module in layer.module.modules():
            if biases in module._parameters:
                module.get_parameter(biases).data.zero_()
    streams = {}
    for batch in layer.meet(writers, dense=True, writers=writers):
        made = [batch.seen[path]["compressed"].outputs for path in writers]
        streams[batch.rows.start] = sum(made, walked.hidden("compressed", batch.rows).flatten(0, 1))
    layer.finish()
    for rows in walked.batches:
        assert torch.allclose(walked.hidden("compressed", rows).flatten(0, 1), streams[rows.start], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in TINY if name not in WRITING])
def test_others_have_no_writers(name: str) -> None:
    model_type, settings = TINY[name]
    assert "post-norm" in name or name == "opt-350m" or model_type.startswith("gemma")
    assert FAMILIES[model_type].writes(settings) == ()


@pytest.mark.parametrize("name", [name for name in TINY if FAMILIES[TINY[name][0]].fused_sets])
def test_sets_that_servers_fuse_share_an_input(name: str, tiny: Callable[[str], Path]) -> None:
    for layer in walk(tiny(name)):
        groups = [group for stage in layer.stages() for group in stage]
        for parts in family_of(layer.walk.assembly.weights.source.config).fused_sets:
            assert parts in groups or not set(parts) & layer.linears.keys()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"skip": ["k_proj"]}, "`self_attn.k_proj`, `self_attn.q_proj`, `self_attn.v_proj`"),
        ({"bits_for": ["up_proj=8"]}, "`mlp.gate_proj`, `mlp.up_proj`"),
        ({"bits_for": [r"layers\.1\..*up_proj=16"]}, "alike, which they are not in layer 1"),
    ],
    ids=str,
)
def test_splitting_what_servers_fuse_warns(
    options: dict[str, Any], said: str, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    _, warnings = compress(tiny("llama"), tmp_path / "out", text, **options)
    assert len(warnings) == 1
    assert said in warnings[0]
    assert torch.equal(plain(tmp_path / "out", dtype=torch.float32), logits(load(tmp_path / "out")[0]))
    _, warnings = compress(tiny("llama"), tmp_path / "dense", text, **options, format="dense")
    assert not warnings


def test_what_is_left_dense_is_named_as_it_is_on_disk(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    compress(tiny("llama"), tmp_path / "out", text, skip=["[qkv]_proj"], bits_for=[r"layers\.1\.self.*=16"])
    ignored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    left = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "qkv"]
    assert set(ignored) == {"lm_head", "model.layers.1.self_attn.o_proj", *left}


@pytest.mark.parametrize("name", PACKED)
def test_every_dense_matrix_of_a_layer_is_ignored_by_name(
    name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    compress(tiny(name), tmp_path / "out", method="rtn", skip=[r"\.0\..*(qkv|q_proj|query_key_value)"])
    ignored = set(json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"])
    source = Checkpoint.open(tmp_path / "out")
    family = family_of(source.config)
    dense = {name for name, entry in source.entries.items() if name.endswith(".weight") and len(entry.shape) == 2}
    layers = {name.removesuffix(".weight") for name in dense if family.layer_of(name) is not None}
    assert layers
    assert layers <= ignored
    assert family.head.removesuffix(".weight") in ignored
    assert not any(f"{module}.weight_packed" in source.entries for module in ignored)


PICTURES = {
    "text_config": {**TINY["gemma3"][1], "image_token_index": 500},
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
    "image_token_index": 500,
}


def test_models_of_pictures_are_refused_by_their_type(text: Path, tmp_path: Path) -> None:
    """Their text model keeps its sizes in `text_config`, and its modules other names than on disk."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    src = tmp_path / "src"
    Gemma3ForConditionalGeneration(Gemma3Config(**PICTURES)).save_pretrained(src)
    for method, read in (("gptq", text), ("rtn", None)):
        with pytest.raises(InputError, match="model type `gemma3` is not one") as caught:
            compress(src, tmp_path / "out", read, method=method)
        assert "`gemma3_text`" in str(caught.value.hint)
        assert not (tmp_path / "out").exists()
    assert torch.equal(logits(load(src)[0]), plain(src, dtype=torch.float32))
    assert summary(src)["model_type"] == "gemma3"
    assert summary(src)["embedding_rows"] == 512
