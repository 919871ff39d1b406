"""Quantised models that run on their codes: what they say, what they hold, what they take."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rewright.formats.checkpoint import Checkpoint
from rewright.kernels.pack import pack
from rewright.passes.errors import InputError
from rewright.passes.generate import bench, generate
from rewright.passes.loading import Assembly, load
from rewright.passes.models import int4pack, packed_forms
from rewright.passes.models.packed import PackedLinear
from rewright.passes.models.packed_forms import Arena, Bitmask, Int4, Scratch, Stored, Stream
from tests.passes.compressing import compress, logits
from tests.passes.conftest import PACKED, STORIES, TOKENIZER

CPU = torch.device("cpu")
GROUP = 32


def quantised(src: Path, dst: Path, **options: Any) -> Path:
    compress(src, dst, **{"method": "rtn", "group_size": GROUP, **options})
    return dst


def runs_packed(model: nn.Module) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def both(path: Path, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a model that runs on its codes, and of the same one decoded as it is loaded."""
    model = load(path, dtype, packed=True)[0]
    assert runs_packed(model)
    return logits(model), logits(load(path, dtype)[0])


def stream(
    rows: int,
    columns: int,
    bits: int = 4,
    group: int = GROUP,
    *,
    zero: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Stream:
    draws = torch.Generator().manual_seed(rows + columns + bits)
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (rows, columns), generator=draws, dtype=torch.int8)
    scale = (torch.rand(rows, columns // group, generator=draws) + 0.5).to(dtype)
    zeros = torch.randint(-8, 8, scale.shape, generator=draws, dtype=torch.int8) if zero else None
    return Stream(pack(codes, bits), bits, (rows, columns), scale, zeros)


def dense(matrix: Stored) -> torch.Tensor:
    """What the matrix stands for, exactly, float64."""
    shift = 0 if matrix.zero is None else matrix.zero.double()[..., None]
    codes = matrix.codes(0, matrix.shape[0]).double().view(*matrix.scale.shape, -1)
    return ((codes - shift) * matrix.scale.double()[..., None]).view(matrix.shape)


@pytest.mark.parametrize("name", PACKED)
def test_every_family_says_what_it_says_decoded(name: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    sizes = {"group_size": 8} if name in ("mixtral", "qwen3_moe", "opt-350m") else {}
    path = quantised(tiny(name), tmp_path / "out", **sizes)
    assert torch.equal(*both(path, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2},
        {"bits": 3},
        {"bits": 4},
        {"bits": 8},
        {"bits": 4, "group_size": "channel"},
        {"bits": 4, "group_size": 8},
        {"bits": 4, "symmetric": False},
        {"bits": 3, "symmetric": False},
        {"bits": 4, "format": "bitmask-w4", "pattern": "16:32"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_form_says_what_it_says_decoded(
    options: dict[str, Any], dtype: torch.dtype, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """To the bit in float32 and float16; in bfloat16 for the rows at hand, which are more than codes are used for."""
    path = quantised(tiny("llama"), tmp_path / "out", **options)
    ours, theirs = both(path, dtype)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [32, 64, 96, 192, 384])
@pytest.mark.parametrize("rows", [16, 32, 48, 64, 208])
def test_products_by_codes_are_nearer_than_decoded_weights(rows: int, group: int, zero: bool) -> None:
    """The bound of conformance: twice the error of decoded bfloat16 weights, and rounding of the result."""
    matrix = stream(rows, 384, group=group, zero=zero)
    size = int4pack.group_for(rows, 384, group)
    assert size is not None
    exact, weight = dense(matrix), matrix.decode(torch.bfloat16, None)
    form = Int4(matrix, size, Scratch())
    assert torch.equal(form.decode(torch.bfloat16, None), weight)
    assert torch.equal(form.decode(torch.float32, Scratch()), exact.float())
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(1)).bfloat16()
    for count in (1, 3, int4pack.MOST_ROWS):
        given = torch.randn(count, 384, generator=torch.Generator().manual_seed(count)).bfloat16()
        found = form.multiply(given, bias, learns=False)
        assert found is not None
        wanted = given.double() @ exact.t() + bias.double()
        decoded = torch.nn.functional.linear(given, weight, bias)
        bound = 2 * (decoded.double() - wanted).abs().max() + torch.finfo(torch.bfloat16).eps * wanted.abs().max()
        assert (found.double() - wanted).abs().max() <= bound
    assert form.multiply(torch.zeros(int4pack.MOST_ROWS + 1, 384, dtype=torch.bfloat16), None, learns=False) is None
    assert form.multiply(torch.zeros(1, 384), None, learns=False) is None


def test_one_token_in_bfloat16(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Logits before each token, one forward each, within the bound of bfloat16 of the model in float64."""
    path = quantised(tiny("llama"), tmp_path / "out")
    tokens = torch.randint(3, 512, (64, 1), generator=torch.Generator().manual_seed(2))
    models = [load(path, torch.bfloat16, packed=packed)[0] for packed in (True, False)]
    exact = load(path, torch.float64)[0]
    assert any(isinstance(linear.form, Int4) for linear in runs_packed(models[0]))
    with torch.no_grad():
        wanted = torch.cat([exact(input_ids=row[None]).logits for row in tokens])
        ours, decoded = (torch.cat([model(input_ids=row[None]).logits for row in tokens]) for model in models)
    errors = [(found.double() - wanted).abs().max() for found in (ours, decoded)]
    assert errors[0] <= 2 * errors[1] + torch.finfo(torch.bfloat16).eps * wanted.abs().max()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_layout_is_learned(capability: str) -> None:
    """Whichever of its kernels torch takes, the codes come back from its form."""
    code = (
        "import torch\n"
        "from rewright.passes.models import int4pack\n"
        "for rows in (16, 64, 112, 272):\n"
        "    assert int4pack.group_for(rows, 96, 32) == 32\n"
        "    codes = torch.randint(-8, 8, (rows, 96), dtype=torch.int8)\n"
        "    packed = int4pack.pack(lambda a, b: codes[a:b], torch.empty(rows, 48, dtype=torch.uint8))\n"
        "    out = torch.empty(96, rows, dtype=torch.int8)\n"
        "    assert torch.equal(int4pack.unpack(packed, (0, rows), (0, 96), out), codes.t())\n"
        "    start = rows // 128 * 64\n"
        "    out = torch.empty(32, rows - start, dtype=torch.int8)\n"
        "    assert torch.equal(int4pack.unpack(packed, (start, rows), (32, 64), out), codes[start:, 32:64].t())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "ATEN_CPU_CAPABILITY": capability})


@pytest.mark.parametrize(("rows", "columns", "group"), [(24, 64, 32), (0, 64, 32), (64, 48, 48), (64, 64, 16)])
def test_shapes_that_torch_has_no_product_for(rows: int, columns: int, group: int) -> None:
    assert int4pack.group_for(rows, columns, group) is None


def test_a_torch_without_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another order of bits, or none at all: the file's own form is kept."""
    for broken in (lambda codes: codes, lambda codes: torch.zeros(codes.numel() // 2, dtype=torch.uint8)):
        int4pack._usable.cache_clear()
        int4pack._blocks.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(int4pack, "_convert", broken)
            linear = PackedLinear(nn.Linear(64, 64, bias=False), Scratch())
            linear.fill(stream(64, 64), torch.bfloat16)
            assert isinstance(linear.form, Stream)
    int4pack._usable.cache_clear()
    int4pack._blocks.cache_clear()


@pytest.mark.parametrize("widths", [(4, 8), (3, 3)], ids=str)
def test_gradients_reach_the_inputs(widths: tuple[int, int]) -> None:
    """And what they need is not written over by the next layer."""
    scratch = Scratch()
    pair = [PackedLinear(nn.Linear(64, 64, bias=False), scratch) for _ in range(2)]
    for seed, linear in enumerate(pair):
        linear.fill(stream(64, 64, bits=widths[seed]), torch.float32)
    given = torch.randn(3, 64, requires_grad=True)
    pair[1](pair[0](given)).sum().backward()
    wanted = torch.ones(3, 64) @ pair[1].weight @ pair[0].weight
    assert given.grad is not None
    torch.testing.assert_close(given.grad, wanted)


def test_memory_for_decoding_serves_in_and_out_of_inference_mode() -> None:
    linear = PackedLinear(nn.Linear(64, 64, bias=False), Scratch())
    linear.fill(stream(64, 64), torch.bfloat16)
    twin = copy.deepcopy(linear)
    given = torch.randn(1, 64).bfloat16()
    with torch.inference_mode():
        first = linear(given), linear(given.repeat(64, 1))
    with torch.no_grad():
        second = linear(given), linear(given.repeat(64, 1))
        assert torch.equal(twin(given), second[0])
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_nothing_is_held_twice(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Tied embeddings are one tensor, packed matrices take what they take in the file, and go when they are let go."""
    path = quantised(tiny("llama-tied"), tmp_path / "out")
    source = Checkpoint.open(path)
    assembly = Assembly(source, torch.float32, CPU, packed=True)
    assembly.check()
    assembly.place()
    model = assembly.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.lm_head) is nn.Linear
    held = sum(tensor.nbytes for linear in runs_packed(model) for tensor in linear.buffers())
    stored = [entry for name, entry in source.entries.items() if name.endswith(("_packed", "_scale"))]
    assert held == sum(entry.nbytes for entry in stored)
    assembly.release("model.layers.0")
    assert all(linear.form is None for linear in runs_packed(model.model.layers[0]))
    before = logits(load(path, torch.float32)[0])
    assembly.place("model.layers.0")
    assert torch.equal(logits(model), before)


def test_an_arena_that_is_too_small() -> None:
    arena = Arena(100)
    kept, own = arena.keep(torch.arange(8)), torch.arange(8)
    assert arena.keep(own) is own
    assert torch.equal(kept, own)


@pytest.mark.parametrize("leaf", ["weight_scale", "weight_zero_point"])
def test_scales_that_are_no_numbers(leaf: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    path = quantised(tiny("llama"), tmp_path / "out", symmetric=False)
    tensors = load_file(path / "model.safetensors")
    name = f"model.layers.1.mlp.up_proj.{leaf}"
    if leaf == "weight_scale":
        tensors[name][3, 0] = float("nan")
        match = r"`model\.layers\.1\.mlp\.up_proj\.weight` holds values that are not finite"
    else:
        tensors[name] = tensors[name][:-1]
        match = name
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=match):
        load(path, packed=True)


def test_weights_past_the_dtype(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    path = quantised(tiny("llama"), tmp_path / "out")
    tensors = load_file(path / "model.safetensors")
    scale = tensors["model.layers.0.mlp.up_proj.weight_scale"]
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.full_like(scale, 60000, dtype=torch.bfloat16)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"`model\.layers\.0\.mlp\.up_proj\.weight` holds values that are not finite"):
        load(path, torch.float16, packed=True)


def test_bench_of_a_packed_model(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """It runs in bfloat16 for the asking of nothing, holds what the file holds, and reads no table whole."""
    path = quantised(tiny("llama"), tmp_path / "out")
    found = bench(path, prompt_tokens=8, new_tokens=4, threads=1)
    assert found["dtype"] == "bfloat16"
    source = Checkpoint.open(path)
    dense_bytes = sum(e.nbytes for e in source.entries.values() if not e.name.endswith(("_packed", "_scale", "_shape")))
    packed = sum(e.nbytes for e in source.entries.values() if e.name.endswith(("_packed", "_scale")))
    assert found["weight_bytes"] == packed + dense_bytes // 2
    # keys and values of 10 tokens: 2 layers of 2 heads of 8
    cached = 2 * 2 * 2 * 8 * 2 * 10
    assert found["bytes_read_per_token"] == found["weight_bytes"] - 511 * 32 * 2 + cached
    assert found["peak_resident_bytes"] > found["peak_over_idle_bytes"] >= 0
    assert bench(path, prompt_tokens=8, new_tokens=4, threads=1, dtype="f32")["dtype"] == "float32"
    story = "".join(generate(path, "Once", max_new_tokens=8, threads=1))
    assert story == "".join(generate(path, "Once", max_new_tokens=8, threads=1, dtype="bf16"))


def larger(folder: Path, rows: int = 1024, wide: int = 2816, layers: int = 16) -> Path:
    """A random W4 model of about 110 MB in groups of 64, nearly all of it packed matrices."""
    settings = json.loads((STORIES / "config.json").read_text())
    heads = {"num_attention_heads": rows // 64, "num_key_value_heads": rows // 64, "head_dim": 64}
    settings |= {**heads, "hidden_size": rows, "intermediate_size": wide, "num_hidden_layers": layers}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    group = {"targets": ["Linear"], "weights": weights}
    settings["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    draws = torch.Generator().manual_seed(1)
    table = torch.randn(settings["vocab_size"], rows, generator=draws).bfloat16()
    tensors = {"model.embed_tokens.weight": table, "model.norm.weight": torch.ones(rows).bfloat16()}
    if not settings.get("tie_word_embeddings", True):
        tensors["lm_head.weight"] = table.clone()
    shapes = {f"self_attn.{part}_proj": (rows, rows) for part in "qkvo"}
    shapes |= {"mlp.gate_proj": (wide, rows), "mlp.up_proj": (wide, rows), "mlp.down_proj": (rows, wide)}
    for layer in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(rows).bfloat16()
        for part, (height, width) in shapes.items():
            name = f"model.layers.{layer}.{part}"
            words = torch.randint(-(2**31), 2**31 - 1, (height, width // 8), generator=draws, dtype=torch.int32)
            tensors[f"{name}.weight_packed"] = words
            tensors[f"{name}.weight_scale"] = torch.full((height, width // 64), 0.002).bfloat16()
            tensors[f"{name}.weight_shape"] = torch.tensor([height, width])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    for file in TOKENIZER:
        (folder / file).write_bytes((STORIES / file).read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


MEASURED = """
import json, sys
from rewright.passes.generate import generate
from rewright.passes.machine import peak_resident
small, large = sys.argv[1:]
# what imports, and libraries when they are first used, take of memory is no model's
"".join(generate(small, "Once", max_new_tokens=4, threads=1))
idle = peak_resident()
text = "".join(generate(large, "Once", max_new_tokens=8, threads=1))
print(json.dumps({"taken": peak_resident() - idle}))
"""


def test_memory_that_generating_takes(tmp_path: Path) -> None:
    """File, activations, keys and values, and a tenth."""
    small, large = larger(tmp_path / "small", 64, 128, 2), larger(tmp_path / "large")
    ended = subprocess.run([sys.executable, "-c", MEASURED, str(small), str(large)], check=True, capture_output=True)
    taken = json.loads(ended.stdout)["taken"]
    file = (large / "model.safetensors").stat().st_size
    tokens = 16
    activations = tokens * (4 * 1024 + 3 * 2816) * 4
    cache = 2 * 16 * 1024 * tokens * 2
    assert file / 2 < taken <= 1.1 * (file + activations + cache)


def test_products_on_a_gpu_go_to_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tensors are on one; here their definitions stand in for it."""
    monkeypatch.setattr(packed_forms, "_on_gpu", lambda rows: rows.dtype == torch.bfloat16)
    matrix = stream(64, 128, group=64)
    bias = torch.randn(64).bfloat16()
    codes = matrix.codes(0, 64).view(64, 2, 64)
    codes[..., 32:] = 0
    from rewright.kernels.bitmask import pack_bitmask

    half = Stream(pack(codes.reshape(64, 128), 4), 4, (64, 128), matrix.scale, None)
    mask = Bitmask(*pack_bitmask(codes.reshape(64, 128), 64, 32), (64, 128), matrix.scale)
    for form, same in ((matrix, matrix), (mask, half)):
        for count in (1, 8, 9, 40):
            given = torch.randn(count, 128).bfloat16()
            found = form.multiply(given, bias, learns=False)
            wanted = given.double() @ dense(same).t() + bias.double()
            if found is None:
                assert form is mask
                assert count > 8
                continue
            torch.testing.assert_close(found.double(), wanted, rtol=2**-7, atol=2**-7 * float(wanted.abs().max()))
        assert form.multiply(torch.zeros(1, 128), bias, learns=False) is None


@pytest.mark.parametrize("bits", [3, 4])
def test_learning_through_a_packed_matrix_keeps_no_decoded_one(bits: int, tmp_path: Path) -> None:
    """The gradient is that of the dense matrix, and what waits for it is smaller than the matrix."""
    out = quantised(STORIES, tmp_path / "out", bits=bits)
    found = []
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    for packed in (True, False):
        model, _ = load(out, torch.float32, packed=packed)
        layer = model.model.layers[0].mlp.gate_proj
        inputs = torch.linspace(-1, 1, 2 * layer.in_features).view(2, -1).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outputs = layer(inputs)
        found.append(torch.autograd.grad(outputs.square().sum(), inputs)[0])
        if packed:
            assert isinstance(layer, PackedLinear)
            assert max(kept, default=0) < layer.in_features * layer.out_features
    assert torch.equal(*found)
