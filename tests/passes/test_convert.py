"""`convert`: every form into every other, without loss, or a refusal that names the matrix."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file

from rewright.formats.verify import verify
from rewright.kernels.pack import pack, unpack
from rewright.passes.loading import load
from rewright.passes.pipeline import plan
from rewright.passes.recipe import make as make_stage
from rewright.passes.run_options import RunOptions
from rewright.passes.survey import Run
from tests.passes.compressing import change, compress, logits, plain
from tests.passes.conftest import EXPERTS, STORIES, make
from tests.passes.converting import DENSE, HALF, MASKED, PACKED, config, convert, forget, reconfigure
from tests.passes.forks import Forks, Strike
from tests.passes.outputs import beside, contents, stamp


def dry(src: Path, to: str) -> dict[str, Any]:
    document = plan(Run(src, Path("/nowhere/out"), (make_stage(1, "convert", {"to": to}),), RunOptions(threads=1)))
    stage = document["stages"][0]
    assert isinstance(stage, dict)
    return stage


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def tensors_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor."""
    return {name: t.numpy().tobytes() for name, t in _bitwise(load_file(folder / "model.safetensors")).items()}


def _bitwise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.view(torch.int16) if t.dtype == torch.bfloat16 else t for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "mixtral"])
def test_there_and_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    p, b, d = tmp_path / "p", tmp_path / "b", tmp_path / "d"
    compress(make(name, tmp_path / "src", dtype), p, **HALF)
    found = convert(p, b, MASKED)["stages"][0]["metrics"]
    # a mask, half a nibble a weight, a scale for 16, and 16 bytes of shape for matrices that are tiny
    assert 4 < found["bits_per_weight"] < 4 + 8 * 16 / (16 * 32) + 1e-6
    assert found["sparsity"] == stamp(p)["stages"][0]["metrics"]["sparsity"]
    convert(b, tmp_path / "p2", PACKED)
    convert(tmp_path / "p2", tmp_path / "b2", MASKED)
    convert(p, d, DENSE)
    convert(b, tmp_path / "d2", DENSE)
    for one in (p, b, d):
        assert weights(one) == weights(tmp_path / f"{one.name}2")
        assert (one / "config.json").read_bytes() == (tmp_path / f"{one.name}2" / "config.json").read_bytes()
        assert verify(one).problems == []
    assert config(d) == config(tmp_path / "src")
    assert torch.equal(logits(load(d)[0]), logits(load(p)[0]))
    if name not in EXPERTS or dtype == torch.bfloat16:
        # plain transformers runs packed experts in the dtype of their scales
        assert torch.equal(plain(d, dtype=dtype), plain(p, dtype=dtype))
    assert {t.dtype for t in load_file(d / "model.safetensors").values()} == {dtype}


def test_compress_writes_what_convert_makes(half: Path, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    for form in (MASKED, DENSE):
        compress(tiny("llama"), tmp_path / form, format=form, **HALF)
        convert(half, tmp_path / f"own-{form}", form)
        assert weights(tmp_path / form) == weights(tmp_path / f"own-{form}")
        assert config(tmp_path / form) == config(tmp_path / f"own-{form}")


@pytest.mark.parametrize(
    "said",
    [
        {"bits": 2},
        {"bits": 3},
        {"bits": 8, "group-size": "channel"},
        {"group-size": "channel"},
        {"symmetric": False},
        {"bits": 3, "symmetric": False},
        {"bits-for": ["q_proj=8", "down_proj=3"]},
    ],
    ids=lambda said: " ".join(f"{key} {value}" for key, value in said.items()),
)
def test_any_codes_become_dense(said: dict[str, Any], tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Against the unpacking of compressed-tensors, and, where transformers loads them, against its decoding."""
    p, d = tmp_path / "p", tmp_path / "d"
    compress(tiny("llama"), p, method="rtn", **said)
    found = convert(p, d, DENSE)
    stored, dense = load_file(p / "model.safetensors"), load_file(d / "model.safetensors")
    zeros = 0
    for name in [name for name in stored if name.endswith(".weight_packed")]:
        module = name.removesuffix(".weight_packed")
        bits = next(b for regex, b in (("q_proj", 8), ("down_proj", 3), ("", 4)) if regex in module)
        bits = said.get("bits", bits if "bits-for" in said else 4)
        shape = torch.Size(stored[f"{module}.weight_shape"].tolist())
        codes = unpack_from_int32(stored[name], bits, shape).float()
        scale = stored[f"{module}.weight_scale"].float()
        if f"{module}.weight_zero_point" in stored:
            zero = unpack_from_int32(stored[f"{module}.weight_zero_point"], bits, scale.shape, packed_dim=0)
            codes -= zero.float().repeat_interleave(shape[1] // scale.shape[1], dim=1)
        zeros += int((codes == 0).sum())
        assert torch.equal(
            dense[f"{module}.weight"], codes * scale.repeat_interleave(shape[1] // scale.shape[1], dim=1)
        )
    total = sum(dense[name.replace("_packed", "")].numel() for name in stored if name.endswith("_packed"))
    assert found["stages"][0]["metrics"]["sparsity"] == zeros / total
    if said.get("symmetric", True):
        assert torch.equal(plain(d), plain(p))


def test_a_model_in_the_form_already_is_linked(half: Path, tmp_path: Path) -> None:
    document = convert(half, tmp_path / "out", PACKED)
    assert os.path.samefile(half / "model.safetensors", tmp_path / "out" / "model.safetensors")
    assert (half / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()
    assert document["stages"][0]["details"]["weights"] == "in that form already, linked"
    assert verify(tmp_path / "out").problems == []
    convert(STORIES, tmp_path / "dense", DENSE)
    assert os.path.samefile(STORIES / "model.safetensors", tmp_path / "dense" / "model.safetensors")


def _thin(tensors: dict[str, torch.Tensor], zeros: int) -> None:
    """Give some of the kept weights of every group the code 0."""
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        columns = int(tensors[name.replace("_packed", "_shape")][1])
        codes = unpack(tensors[name], 4, columns)
        records = codes.view(len(codes), -1, 16)
        for _ in range(zeros):
            first = (records != 0).to(torch.int8).argmax(dim=2, keepdim=True)
            records.scatter_(2, first, 0)
        tensors[name] = pack(codes, 4)


@pytest.mark.parametrize(("zeros", "known", "nnz"), [(1, True, 8), (3, True, 8), (1, False, 8), (3, False, 6)])
def test_records_are_those_of_the_pattern(own: Path, zeros: int, known: bool, nnz: int, tmp_path: Path) -> None:
    """Where nobody says how many a group keeps, it is the most that any has, made even."""
    change(own, lambda tensors: _thin(tensors, zeros))
    if not known:
        forget(own)
    b = tmp_path / "b"
    kept = convert(own, b, MASKED)["stages"][0]["metrics"]["kept"]
    assert (kept if known else config(b)["quantization_config"]["nnz"] / 16) == nnz / 16
    assert config(b)["quantization_config"]["nnz"] == nnz
    convert(b, tmp_path / "p", PACKED)
    assert tensors_of(tmp_path / "p") == tensors_of(own)
    convert(tmp_path / "p", tmp_path / "again", PACKED)
    convert(tmp_path / "again", tmp_path / "b2", MASKED)
    assert weights(tmp_path / "b2") == weights(b)


def test_zeros_of_the_source_are_counted(half: Path, tmp_path: Path) -> None:
    """`--mask keep` has no pattern of its own to tell."""
    convert(half, tmp_path / "d", DENSE)
    compress(tmp_path / "d", tmp_path / "kept", method="rtn", mask="keep", group_size=16)
    convert(tmp_path / "kept", tmp_path / "b", MASKED)
    assert config(tmp_path / "b")["quantization_config"]["nnz"] == 8


def test_modules_that_others_left_dense_stay_so(own: Path, tmp_path: Path) -> None:
    """Targets and ignore lists of other tools are patterns; the bitmask form names every dense module."""

    def decode_one(tensors: dict[str, torch.Tensor]) -> None:
        for layer in (0, 1):
            for leaf in ("packed", "scale", "shape"):
                del tensors[f"model.layers.{layer}.self_attn.v_proj.weight_{leaf}"]
            tensors[f"model.layers.{layer}.self_attn.v_proj.weight"] = torch.ones(16, 32)

    def patterns(said: dict[str, Any]) -> None:
        said["config_groups"]["group_0"]["targets"] = [r"re:.*mlp\..*", r"re:.*\.[qko]_proj$"]
        said["ignore"] = ["re:.*lm_head"]

    reconfigure(change(own, decode_one), patterns)
    convert(own, tmp_path / "b", MASKED)
    convert(tmp_path / "b", tmp_path / "p", PACKED)
    dense = {"model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj", "lm_head", "re:.*lm_head"}
    for folder in ("b", "p"):
        assert dense <= set(config(tmp_path / folder)["quantization_config"]["ignore"])
    assert tensors_of(tmp_path / "p") == tensors_of(own)
    assert torch.equal(plain(tmp_path / "p"), plain(own))


def test_what_is_not_packed_travels_byte_for_byte(own: Path, tmp_path: Path) -> None:
    odd = {"mtp.fc.weight": torch.tensor([[float("nan"), -0.0]]), "model.layers.0.rotary.inv_freq": torch.ones(3)}
    change(own, lambda tensors: tensors.update(odd))
    (own / "extra").mkdir()
    (own / "extra" / "note.txt").write_text("x")
    convert(own, tmp_path / "b", MASKED)
    found = load_file(tmp_path / "b" / "model.safetensors")
    assert all(found[name].numpy().tobytes() == tensor.numpy().tobytes() for name, tensor in odd.items())
    assert (tmp_path / "b" / "extra" / "note.txt").read_text() == "x"


@pytest.mark.parametrize("to", [MASKED, DENSE])
def test_dry_run_tells_the_bytes(half: Path, to: str, tmp_path: Path) -> None:
    said = dry(half, to)
    convert(half, tmp_path / "out", to)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert said["output_bytes"] == sum(t.numel() * t.element_size() for t in found.values())
    assert said["bytes_moved"] > said["output_bytes"]


def test_dry_run_of_unknown_zeros_says_so(own: Path) -> None:
    assert "unless counting finds more" in dry(forget(own), MASKED)["details"]["kept"]


def _words(src: Path, dst: Path, to: str) -> list[str | Path]:
    return ["convert", "--threads", "1", src, dst, "--to", to]


@pytest.mark.parametrize("to", [MASKED, DENSE])
def test_killed_at_any_moment(forks: Forks, half: Path, to: str, tmp_path: Path) -> None:
    """At changes to the disk drawn at random and at all to the journal: the same command ends in equal bytes."""
    whole, dst = tmp_path / "whole", tmp_path / "out"
    changes = forks.changes(*_words(half, whole, to))
    moments = [Strike(number) for number in random.Random().sample(range(1, changes), 6)]
    moments += [Strike(number, "journal.jsonl") for number in range(1, 5)] + [Strike(2, "model.safetensors")]
    for strike in moments:
        ended = forks.run(*_words(half, dst, to), strike=strike)
        assert ended.code == -signal.SIGKILL, (strike, ended.err)
        ended = forks.run(*_words(half, dst, to))
        assert ended.code == 0, (strike, ended.err)
        assert contents(dst) == contents(whole), strike
        assert all(name.startswith("out.lock") for name in beside(dst)), strike
        shutil.rmtree(dst)


def test_finished_units_are_not_done_again(forks: Forks, half: Path, tmp_path: Path) -> None:
    dst, events = tmp_path / "out", tmp_path / "events.jsonl"
    # the journal is begun, the zeros of two layers are counted, and the first of three units is written
    assert forks.run(*_words(half, dst, MASKED), strike=Strike(5, "journal.jsonl")).code == -signal.SIGKILL
    ended = forks.run(*_words(half, dst, MASKED), "--events", events)
    assert ended.code == 0, ended.err
    done = [event["unit"] for event in map(json.loads, events.read_text().splitlines()) if event["event"] == "written"]
    assert 0 < len(done) < 3
