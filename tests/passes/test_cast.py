"""`cast`: every float tensor rounded once, everything else byte for byte, a config that tells the truth."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.errors import FormatError
from rewright.formats.verify import verify
from rewright.passes import rounding
from rewright.passes.context import Silent
from rewright.passes.loading import load
from rewright.passes.pipeline import execute, plan
from rewright.passes.recipe import parse as parse_recipe
from rewright.passes.run_options import RunOptions
from rewright.passes.survey import Run
from tests.passes.casting import cast, dry, stored, write, write_raw
from tests.passes.compressing import QUICK, compress, logits, plain
from tests.passes.conftest import STORIES, TINY, make
from tests.passes.converting import HALF, PACKED, config, convert
from tests.passes.outputs import beside, contents

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f8_e4m3": torch.float8_e4m3fn}
NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


@pytest.mark.parametrize("to", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "qwen3_moe", "gpt_oss"])
def test_a_model_in_another_dtype(name: str, to: str, tmp_path: Path) -> None:
    """Against torch's own cast of the model, in plain transformers, which asks the config for the dtype."""
    src, out = make(name, tmp_path / "src", torch.bfloat16 if to == "f32" else torch.float32), tmp_path / "out"
    # what a model class holds in float32 beside other matrices of 16 bits is not to be rounded
    keep = ["norm"] if (name, to) == ("gpt_oss", "f16") else []
    metrics = cast(src, out, to, keep=keep)["metrics"]
    before, after = load_file(src / "model.safetensors"), load_file(out / "model.safetensors")
    assert after.keys() == before.keys()
    changed = [key for key in before if not (keep and "norm" in key)]
    assert all(torch.equal(after[key], before[key].to(DTYPES[to])) for key in changed)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == DTYPES[to]
    wanted = AutoModelForCausalLM.from_pretrained(src, dtype=DTYPES[to])
    assert torch.equal(logits(model.eval()), logits(wanted.eval()))
    assert verify(out).problems == []
    size = {
        key: sum(t.numel() * t.element_size() for t in held.values()) for key, held in (("b", before), ("a", after))
    }
    assert (metrics["bytes_before"], metrics["bytes_after"]) == (size["b"], size["a"])
    assert (metrics["cast"], metrics["kept"]) == (len(changed), len(before) - len(changed))
    assert metrics["largest_relative_error"] <= {"bf16": 2.0**-8, "f16": 0.5, "f32": 0}[to]


@pytest.mark.parametrize("name", ["llama-tied", "opt"])
def test_tied_tensors_stay_tied(name: str, tmp_path: Path) -> None:
    src = make(name, tmp_path / "src")
    cast(src, tmp_path / "out", "bf16")
    assert stored(tmp_path / "out").keys() == stored(src).keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_only_what_changes_in_the_config(tmp_path: Path) -> None:
    out = tmp_path / "out"
    cast(STORIES, out, "bf16")
    was, now = (STORIES / "config.json").read_text(), (out / "config.json").read_text()
    assert now == was.replace('"torch_dtype": "float32"', '"torch_dtype": "bfloat16"')
    assert (out / "tokenizer.json").read_bytes() == (STORIES / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("to", ["bf16", "f8_e4m3"])
def test_dtypes_at_every_depth(to: str, tmp_path: Path) -> None:
    said = {
        "dtype": "float32",
        "text_config": {"torch_dtype": "float32", "rope": {"theta": 1.0}},
        "vision_config": {"dtype": "float16", "depth": {"dtype": "float32", "n": None}},
        "audio_config": {"layers": 2},
        "dtypes": ["float32"],
    }
    src = write(tmp_path / "src", {"a.weight": torch.ones(2, 2)}, **said)
    cast(src, tmp_path / "out", to)
    if to == "bf16":
        said["dtype"] = "bfloat16"
        said["text_config"] = {"torch_dtype": "bfloat16", "rope": {"theta": 1.0}}
        said["vision_config"] = {"dtype": "bfloat16", "depth": {"dtype": "bfloat16", "n": None}}
    assert config(tmp_path / "out") == said


@pytest.mark.parametrize(("to", "found"), [("bf16", "bfloat16"), ("f8_e4m3", "float32")])
def test_a_config_without_dtype_gets_one(to: str, found: str, tmp_path: Path) -> None:
    """transformers would take the dtype of the first tensor, which may be one that is kept, or of 8 bits."""
    src = Path(shutil.copytree(STORIES, tmp_path / "src"))
    said = {key: value for key, value in config(src).items() if key != "torch_dtype"}
    (src / "config.json").write_text(json.dumps(said))
    cast(src, tmp_path / "out", to, keep=["norm"])
    assert config(tmp_path / "out") == {**said, "dtype": found}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, found)


@pytest.mark.parametrize("to", DTYPES)
def test_the_dtype_that_all_have_already(to: str, tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(3, 5).to(DTYPES[to]), "a.bias": torch.full((3,), float("nan")).to(DTYPES[to])}
    src = write(tmp_path / "src", tensors, dtype=NAMES.get(to, "bfloat16"))
    metrics = cast(src, tmp_path / "out", to)["metrics"]
    assert stored(tmp_path / "out") == stored(src)
    assert (tmp_path / "out" / "config.json").read_bytes() == (src / "config.json").read_bytes()
    assert (metrics["cast"], metrics["kept"], metrics["largest_relative_error"]) == (0, 2, 0.0)


def test_what_holds_no_plain_numbers_is_not_touched(tmp_path: Path) -> None:
    data = bytes(range(16))
    counts = {"BOOL": 16, "U8": 16, "I8": 16, "I16": 8, "U16": 8, "I32": 4, "U32": 4, "I64": 2, "U64": 2, "C64": 2}
    counts |= {"F8_E8M0": 16, "F8_E4M3FNUZ": 16, "F8_E5M2FNUZ": 16, "F4": 32}
    kept = {name: (name, [count], data) for name, count in counts.items()}
    floats = {"F64": [2], "F32": [4], "F16": [8], "F8_E4M3": [4, 4], "F8_E5M2": [4, 4]}
    small = b"\0\x3c" * 8
    src = write_raw(tmp_path / "src", {**kept, **{name: (name, shape, small) for name, shape in floats.items()}})
    for to in ("bf16", "f32"):
        cast(src, tmp_path / to, to)
        found, was = stored(tmp_path / to), stored(src)
        assert {name: found[name] for name in kept} == {name: was[name] for name in kept}
        assert {found[name][:2] for name in floats} == {(to.upper(), tuple(shape)) for shape in floats.values()}
        assert (tmp_path / to / "config.json").read_bytes() == b"{}"


def test_8_bit_floats_widen_without_loss(tmp_path: Path) -> None:
    every = torch.arange(256).to(torch.uint8)
    held = {"a.weight": every.view(torch.float8_e4m3fn), "b.weight": every.clone().view(torch.float8_e5m2)}
    src = write(tmp_path / "src", held)
    for to in ("bf16", "f16", "f32"):
        cast(src, tmp_path / to, to)
        for name, tensor in load_file(tmp_path / to / "model.safetensors").items():
            assert torch.equal(tensor.double().nan_to_num(-9), held[name].double().nan_to_num(-9))


def test_keep(tmp_path: Path) -> None:
    src = make("qwen3_moe", tmp_path / "src")
    found = cast(src, tmp_path / "out", "bf16", keep=[r"\.gate\.weight$", "norm"])
    after = load_file(tmp_path / "out" / "model.safetensors")
    kept = {name for name, tensor in after.items() if tensor.dtype == torch.float32}
    assert kept == {name for name in after if name.endswith(".gate.weight") or "norm" in name}
    assert found["metrics"]["kept"] == len(kept) == len(after) - found["details"]["cast"]
    # nothing is of the new dtype, and nothing says so
    cast(src, tmp_path / "all", "f16", keep=["."])
    assert stored(tmp_path / "all") == stored(src)
    assert config(tmp_path / "all") == config(src)


@pytest.mark.parametrize("size", ["1", "20kB", "64KiB", "1GB"])
def test_shards(size: str, tmp_path: Path) -> None:
    made = cast(STORIES, tmp_path / "out", "bf16", max_shard_size=size)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == made["details"]["files"] == {"1": 47, "1GB": 1}.get(size, len(files))
    most = {"1": 1, "20kB": 20_000, "64KiB": 65536, "1GB": 10**9}[size]
    for file in files:
        held = load_file(file)
        assert len(held) == 1 or sum(t.numel() * 2 for t in held.values()) <= most
    assert verify(tmp_path / "out").problems == []
    cast(STORIES, tmp_path / "one", "bf16")
    assert stored(tmp_path / "out") == {name: stored(tmp_path / "one")[name] for name in stored(tmp_path / "out")}
    assert torch.equal(plain(tmp_path / "out"), plain(tmp_path / "one"))
    # and together again
    cast(tmp_path / "out", tmp_path / "back", "bf16")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "one/model.safetensors").read_bytes()
    assert not (tmp_path / "back" / "model.safetensors.index.json").exists()


def test_a_bare_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_file({"x": torch.tensor([1 / 3, -0.0]), "n": torch.tensor(3)}, tmp_path / "in" / "adapter.safetensors")
    (tmp_path / "in" / "note.txt").write_text("nobody's business")
    cast(tmp_path / "in" / "adapter.safetensors", tmp_path / "out", "f16")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model.safetensors", "rewright.json"}
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert (found["x"].dtype, found["n"].dtype) == (torch.float16, torch.int64)
    assert found["x"].tolist() == [torch.tensor(1 / 3).half().item(), 0.0]


def test_dry_run_tells_what_comes(tmp_path: Path) -> None:
    said = dry(STORIES, "f8_e4m3", keep=["norm"], max_shard_size="100kB")
    made = cast(STORIES, tmp_path / "out", "f8_e4m3", keep=["norm"], max_shard_size="100kB")
    assert said["output_bytes"] == made["metrics"]["bytes_after"] == Checkpoint.open(tmp_path / "out").total_bytes
    assert said["details"] == {
        "cast": made["metrics"]["cast"],
        "files": len(list((tmp_path / "out").glob("*.safetensors"))),
    }


def test_8_bits_are_widened_as_they_are_loaded(tmp_path: Path) -> None:
    """The config still says what is computed in; with 8 bits there torch has no such default, and nothing loads."""
    src, out = make("llama", tmp_path / "src", torch.bfloat16), tmp_path / "out"
    found = cast(src, out, "f8_e4m3")["metrics"]
    before, held = load_file(src / "model.safetensors"), load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in held.values()} == {torch.float8_e4m3fn}
    assert found["bytes_after"] * 2 == found["bytes_before"]
    assert found["zeroed"] == sum(int(((held[n].float() == 0) & (t != 0)).sum()) for n, t in before.items())
    assert (out / "config.json").read_bytes() == (src / "config.json").read_bytes()
    rounded = AutoModelForCausalLM.from_pretrained(src)
    rounded.load_state_dict({n: t.bfloat16() for n, t in held.items()})
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(model.eval()), logits(rounded.eval()))
    ours = load(out, dtype=torch.bfloat16)[0]
    assert torch.equal(logits(ours), logits(model))
    cast(out, tmp_path / "back", "bf16")
    assert torch.equal(plain(tmp_path / "back"), logits(model))


@pytest.mark.parametrize("to", ["f16", "f32", "f8_e4m3"])
def test_codes_and_scales_stay(half: Path, to: str, tmp_path: Path) -> None:
    for form in ("pack-quantized", "bitmask-w4"):
        src, out = tmp_path / form, tmp_path / f"{form}-out"
        convert(half, src, form)
        cast(src, out, to)
        was, now = stored(src), stored(out)
        packed = {n for n in was if n.removesuffix(".weight") + ".weight_scale" in was or ".weight_" in n}
        assert len(packed) == 14 * (3 if form == PACKED else 4)
        assert {n: now[n] for n in packed} == {n: was[n] for n in packed}
        assert {now[n][0] for n in was.keys() - packed} == {to.upper()}
        assert config(out)["quantization_config"] == config(src)["quantization_config"]
        model = load(out, dtype=torch.float32)[0]
        if to == "f32":
            assert torch.equal(logits(model), logits(load(src)[0]))
    expected = {"f16": "float16"}.get(to, "float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pack-quantized-out")
    assert str(loaded.dtype) == f"torch.{expected}"
    assert logits(loaded.eval()).isfinite().all()


@pytest.mark.parametrize("method", ["fp8", "gptq", "bitsandbytes", "never heard of"])
def test_models_quantised_by_others(method: str, tmp_path: Path) -> None:
    """Whatever the method is called: what stands beside codes is theirs."""
    f8, ones = torch.ones(4, 4).to(torch.float8_e4m3fn), torch.ones(4)
    kept = {
        "l.0.a.weight": f8,
        "l.0.a.weight_scale_inv": ones,
        "l.0.experts.gate_up_proj": f8.clone(),
        "l.0.experts.gate_up_proj_scale_inv": ones.clone(),
        "l.0.b.qweight": torch.ones(4, dtype=torch.int32),
        "l.0.b.scales": ones.half(),
        "l.0.c.weight": torch.ones(4, dtype=torch.uint8),
        "l.0.c.weight.absmax": ones.clone(),
        "l.0.attn.k_scale": ones.clone(),
    }
    floats = {"l.0.b.bias": ones.clone(), "l.0.experts.gate_up_proj_bias": ones.clone(), "norm.weight": ones.clone()}
    src = write(tmp_path / "src", {**kept, **floats}, quantization_config={"quant_method": method, "dtype": "float32"})
    cast(src, tmp_path / "out", "bf16")
    was, now = stored(src), stored(tmp_path / "out")
    assert {name for name in was if was[name] == now[name]} == set(kept)
    assert {now[name][0] for name in floats} == {"BF16"}
    assert config(tmp_path / "out")["quantization_config"] == {"quant_method": method, "dtype": "float32"}
    (src / "config.json").write_text("{}")
    with pytest.raises(FormatError, match=r"tensor `l\.0.* is quantised") as refused:
        cast(src, tmp_path / "never", "bf16")
    assert refused.value.hint
    assert beside(tmp_path / "never") == []


def test_a_large_tensor_is_rounded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "PIECE", 1000)
    cast(STORIES, tmp_path / "pieces", "f16")
    monkeypatch.undo()
    cast(STORIES, tmp_path / "whole", "f16")
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")


def test_chains(text: Path, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Before compressing and after, as stages of a chain and one by one."""
    words = {**QUICK, "method": "rtn"}
    first = '[[stage]]\npass = "cast"\nto = "bf16"\n'
    said = "".join(f"{key} = {json.dumps(value)}\n" for key, value in words.items())
    second = f'[[stage]]\npass = "compress"\n{said}'
    third = '[[stage]]\npass = "cast"\nto = "f16"\nkeep = ["norm"]\nmax-shard-size = "40kB"\n'
    stages = parse_recipe(first + second + third)
    run = Run(tiny("llama"), tmp_path / "chain", stages, RunOptions(threads=1))
    planned = plan(run)
    execute(run, Silent())
    cast(tiny("llama"), tmp_path / "1", "bf16")
    compress(tmp_path / "1", tmp_path / "2", **words)
    cast(tmp_path / "2", tmp_path / "3", "f16", keep=["norm"], max_shard_size="40kB")
    assert stored(tmp_path / "chain") == stored(tmp_path / "3")
    assert config(tmp_path / "chain") == config(tmp_path / "3")
    assert planned["stages"][2]["output_bytes"] == Checkpoint.open(tmp_path / "3").total_bytes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "chain")
    assert model.dtype == torch.float16
    assert torch.equal(logits(model.eval()), plain(tmp_path / "3"))


def test_all_families_load(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    for name in TINY:
        cast(tiny(name), tmp_path / name, "bf16")
        assert {dtype for dtype, _, _ in stored(tmp_path / name).values()} == {"BF16"}
        wanted = AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.bfloat16).eval()
        assert torch.equal(plain(tmp_path / name), logits(wanted)), name


def test_half_kept_models_chain(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """`compress` after `cast` to 16 bits writes what it writes of a model stored so."""
    cast(tiny("llama"), tmp_path / "bf16", "bf16")
    make("llama", tmp_path / "own", torch.bfloat16)
    compress(tmp_path / "bf16", tmp_path / "a", **HALF)
    compress(tmp_path / "own", tmp_path / "b", **HALF)
    assert stored(tmp_path / "a") == stored(tmp_path / "b")


def test_poles_are_not_narrowed(tmp_path: Path) -> None:
    tensors = {
        "layers.0.mixer.modal.poles": torch.rand(3, 2, 2),
        "layers.0.mixer.modal.h0": torch.rand(3),
        "layers.0.mixer.in_proj.weight": torch.rand(3, 3),
        "block.log_poles": torch.rand(3, 4, 1, dtype=torch.float64),
    }
    src = write(tmp_path / "src", tensors)
    for to, wide in (("bf16", "F64"), ("f8_e4m3", "F64"), ("f32", "F32")):
        cast(src, tmp_path / to, to)
        held = {name: dtype for name, (dtype, _, _) in stored(tmp_path / to).items()}
        narrow = {"bf16": "BF16", "f8_e4m3": "F8_E4M3", "f32": "F32"}[to]
        assert held == {
            "layers.0.mixer.modal.poles": "F32",
            "layers.0.mixer.modal.h0": "F32",
            "layers.0.mixer.in_proj.weight": narrow,
            "block.log_poles": wide,
        }
