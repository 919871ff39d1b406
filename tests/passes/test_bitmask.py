"""`compress --format bitmask-w4`: what it writes, who reads it, and what it refuses before any work."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from rewright.formats.bitmask import METHOD, bitmask_specs, parse
from rewright.formats.checkpoint import Checkpoint
from rewright.formats.draft import Draft
from rewright.formats.verify import verify
from rewright.kernels.pack import unpack
from rewright.passes.errors import UsageError
from rewright.passes.loading import load, register
from rewright.passes.pipeline import plan
from rewright.passes.recipe import make as make_stage
from rewright.passes.run_options import RunOptions
from rewright.passes.survey import Run
from rewright.passes.weights import Weights
from tests.passes.compressing import QUICK, compress, logits, plain, report
from tests.passes.conftest import make
from tests.passes.forks import Forks, Strike
from tests.passes.outputs import beside, contents

HALF: dict[str, Any] = {"format": "bitmask-w4", "pattern": "8:16"}
RTN: dict[str, Any] = {"format": "bitmask-w4", "method": "rtn"}


def foretell(src: Path, dst: Path, words: dict[str, Any]) -> dict[str, Any]:
    """The document of a dry run."""
    return plan(Run(src, dst, (make_stage(1, "compress", words),), RunOptions()))


def codes_of(tensors: dict[str, torch.Tensor], module: str, group: int, nnz: int) -> torch.Tensor:
    """A module's codes (rows, groups, group), a column at a time by the definition of the form."""
    mask, values = tensors[f"{module}.weight_mask"], tensors[f"{module}.weight"]
    codes = torch.zeros(*mask.shape[:2], group, dtype=torch.int64)
    for row in range(mask.shape[0]):
        for at in range(mask.shape[1]):
            kept = [column for column in range(group) if mask[row, at, column // 8] >> column % 8 & 1]
            assert len(kept) == nnz
            for rank, column in enumerate(kept):
                codes[row, at, column] = (int(values[row, at, rank // 2]) >> 4 * (rank % 2) & 15) - 8
            # the mask is that of the codes, filled up from the left
            spare = [column for column in kept if codes[row, at, column] == 0]
            assert spare == [column for column in range(group) if codes[row, at, column] == 0][: len(spare)]
    return codes


def test_half_empty_linears_take_less_than_four_bits(text: Path, tmp_path: Path) -> None:
    """At groups of 128 with half of each zero, and no group has a weight too many in either packed form."""
    src = make("llama", tmp_path / "src", hidden_size=256, intermediate_size=384, num_hidden_layers=1)
    options: dict[str, Any] = {"group_size": 128, "pattern": "64:128"}
    compress(src, tmp_path / "packed", text, **options)
    compress(src, tmp_path / "masked", text, **options, format="bitmask-w4")
    packed, masked = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "masked"))
    modules = [name.removesuffix(".weight_mask") for name in masked if name.endswith(".weight_mask")]
    assert len(modules) == 7
    taken = {"packed": 0, "masked": 0}
    weights = 0
    for module in modules:
        rows, columns = masked[f"{module}.weight_shape"].tolist()
        weights += rows * columns
        for said, tensors in (("packed", packed), ("masked", masked)):
            taken[said] += sum(t.nbytes for name, t in tensors.items() if name.startswith(f"{module}."))
        there = codes_of(masked, module, 128, 64)
        assert torch.equal(there.view(rows, columns), unpack(packed[f"{module}.weight_packed"], 4, columns).long())
        assert int((there != 0).sum(dim=2).max()) <= 64, module
        for leaf in ("weight_scale", "weight_shape"):
            assert torch.equal(masked[f"{module}.{leaf}"], packed[f"{module}.{leaf}"])
    assert 8 * taken["masked"] / weights <= 3.13
    assert 8 * taken["packed"] / weights <= 4.13
    assert report(tmp_path / "masked")["summary"]["bits_per_weight"] == pytest.approx(8 * taken["masked"] / weights)
    assert report(tmp_path / "masked")["summary"]["sparsity"] == report(tmp_path / "packed")["summary"]["sparsity"]


@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt-350m", "gemma2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_transformers_reads_what_the_dense_weights_are(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    register()
    src = make(name, tmp_path / "src", dtype)
    for form in ("bitmask-w4", "dense", "pack-quantized"):
        compress(src, tmp_path / form, **{**HALF, "format": form}, method="rtn")
    scales = {e.dtype for e in Checkpoint.open(tmp_path / "bitmask-w4").entries.values() if e.name.endswith("_scale")}
    assert scales == {"F16" if dtype == torch.float16 else "BF16"}
    found = plain(tmp_path / "bitmask-w4", dtype=dtype)
    assert torch.equal(found, logits(load(tmp_path / "bitmask-w4", dtype)[0]))
    assert torch.equal(found, logits(load(tmp_path / "pack-quantized", dtype)[0]))
    # experts are decoded in the dtype of their scales, which in float32 are fewer bits than weights have
    if not (name in ("mixtral", "qwen3_moe") and dtype == torch.float32):
        assert torch.equal(found, plain(tmp_path / "dense", dtype=dtype))
    other = torch.bfloat16 if dtype != torch.bfloat16 else torch.float32
    assert torch.equal(plain(tmp_path / "bitmask-w4", dtype=other), logits(load(tmp_path / "bitmask-w4", other)[0]))


def test_a_model_that_transformers_read_is_dense_and_is_saved_so(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    register()
    compress(tiny("llama"), tmp_path / "out", **HALF, method="rtn")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert model.model.layers[0].mlp.down_proj.weight.requires_grad
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    assert torch.equal(plain(tmp_path / "saved"), logits(model))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_transformers_that_does_not_know_the_form_refuses_it(
    name: str, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fills weights that it does not find with noise, and only warns: so it has to find one of another shape."""
    compress(tiny(name), tmp_path / "out", **HALF, method="rtn")
    for registry in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(registry, METHOD, raising=False)
    with pytest.raises(RuntimeError, match="mismatch"):
        plain(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "records"),
    [
        ({"pattern": "2:4", "group_size": 8}, {(8, 4)}),
        ({"pattern": "4:8", "group_size": 32}, {(32, 16), (40, 20)}),
        ({"pattern": "4:8", "group_size": "channel"}, {(32, 16), (80, 40)}),
        ({"pattern": "6:8", "group_size": 40}, {(40, 30), (32, 24)}),
    ],
    ids=str,
)
def test_records_follow_the_groups(options: dict[str, Any], records: set[tuple[int, int]], tmp_path: Path) -> None:
    compress(make("llama", tmp_path / "src", intermediate_size=80), tmp_path / "out", **options, **RTN)
    read = parse(json.loads((tmp_path / "out/config.json").read_text()))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert read is not None
    seen = set()
    for name in tensors:
        if name.endswith(".weight_mask"):
            record = read.of(name.removesuffix(".weight_mask"))
            assert record is not None
            seen.add((record.group_size, record.nnz))
            codes_of(tensors, name.removesuffix(".weight_mask"), record.group_size, record.nnz)
    assert seen == records
    register()
    assert torch.equal(plain(tmp_path / "out"), logits(load(tmp_path / "out")[0]))


@pytest.mark.parametrize(
    ("said", "message", "hint"),
    [
        ({"sparsity": 0.5}, "an unstructured sparsity does not", "`--pattern 64:128`"),
        ({"sparsity": 0.75, "group-size": 32}, "an unstructured sparsity does not", "`--pattern 8:32`"),
        ({}, "an unstructured sparsity does not", "`--pattern 64:128`"),
        ({"mask": "keep"}, "`--mask keep` does not", "`--pattern 64:128`"),
        ({"pattern": "2:4", "bits": 3}, "`--bits 3` asks for others", "pack-quantized"),
        ({"pattern": "2:4", "bits": 16}, "`--bits 16` asks for others", "pack-quantized"),
        ({"pattern": "2:4", "bits": 3.5, "budget": "measured"}, "`--bits 3.5` asks for others", "4 bits"),
        ({"pattern": "2:4", "budget": "measured"}, "`--budget measured` deals out bits", "pack-quantized"),
        ({"pattern": "2:4", "bits-for": ["down=8"]}, "`--bits-for down=8` asks for others", "4 bits"),
        ({"pattern": "2:4", "symmetric": False}, "no zero points", "`--symmetric`"),
        ({"pattern": "32:64", "group-size": 32}, "no whole number of runs in groups of 32", "`--pattern 16:32`"),
        ({"pattern": "1:4", "group-size": 4}, "groups of 4 are no whole bytes", "`--group-size`"),
        ({"pattern": "1:8", "group-size": 8}, "1 weights of 8 are no whole bytes", "`--pattern 2:8`"),
        ({"pattern": "64:128", "group-size": 128}, "no whole number of runs in groups of 64", "`--pattern 16:32`"),
    ],
    ids=lambda value: " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_refused_before_any_work(
    said: dict[str, Any], message: str, hint: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    text = {} if said.get("budget") is None else {"method": "gptq", "calibration-text": ["text"]}
    with pytest.raises(UsageError) as refusal:
        foretell(tiny("llama"), tmp_path / "out", {"format": "bitmask-w4", "method": "rtn", **text, **said})
    assert message in refusal.value.message
    assert hint in (refusal.value.hint or "")


def test_what_is_foretold_is_what_is_written(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    words = {**QUICK, **HALF, "method": "rtn", "skip": ["v_proj"], "bits-for": ["q_proj=4"]}
    foretold = foretell(tiny("llama"), tmp_path / "out", words)
    compress(tiny("llama"), tmp_path / "out", **{key.replace("-", "_"): value for key, value in words.items()})
    written = Checkpoint.open(tmp_path / "out")
    assert foretold["stages"][0]["output_bytes"] == written.total_bytes
    assert (
        "model.layers.0.self_attn.v_proj"
        in json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    )
    rows = {row["name"]: row for row in report(tmp_path / "out")["matrices"]}
    row = rows["model.layers.0.mlp.down_proj.weight"]
    assert row["bytes"] == sum(spec.nbytes for spec in _specs(written, "model.layers.0.mlp.down_proj"))
    assert (row["bits"], row["group_size"]) == (4, 16)
    assert verify(tmp_path / "out").problems == []


def _specs(source: Checkpoint, module: str) -> list[Any]:
    read = parse(source.config or {})
    assert read is not None
    record = read.of(module)
    assert record is not None
    specs = bitmask_specs(module, (32, 64), record, "BF16")
    assert {spec.name: (spec.dtype, spec.shape) for spec in specs} == {
        name: (entry.dtype, tuple(entry.shape))
        for name, entry in source.entries.items()
        if name.startswith(f"{module}.")
    }
    return specs


def test_a_matrix_is_handed_out_as_it_is_stored(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    for form in ("bitmask-w4", "pack-quantized"):
        compress(tiny("llama"), tmp_path / form, **{**HALF, "format": form}, method="rtn")
    name = "model.layers.1.mlp.down_proj.weight"
    masked, packed = (Weights(Checkpoint.open(tmp_path / f)).packed(name) for f in ("bitmask-w4", "pack-quantized"))
    assert (masked.kind, packed.kind) == ("bitmask-w4", "pack-quantized")
    assert (masked.bits, masked.group_size, masked.shape) == (packed.bits, packed.group_size, packed.shape)
    assert set(masked.tensors) == {"weight_mask", "weight", "weight_scale"}
    assert torch.equal(masked.codes(), packed.codes())
    assert torch.equal(masked.decode(torch.float16), packed.decode(torch.float16))


@pytest.fixture(scope="module")
def whole(tiny: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    compress(tiny("llama"), out, text, **HALF, polish=3)
    return out


# 14 matrices have four tensors each; then come the scales once more, and the norms
@pytest.mark.parametrize("call", [1, 2, 3, 30, 14 * 4 + 5])
def test_an_interruption_changes_no_byte(
    call: int, whole: Path, tiny: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Draft.write, []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Draft, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compress(tiny("llama"), tmp_path / "cut", text, **HALF, polish=3)
    compress(tiny("llama"), tmp_path / "cut", text, **HALF, polish=3)
    assert contents(tmp_path / "cut") == contents(whole)


def test_killed_before_a_layer_is_on_record(
    forks: Forks, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    def words(dst: Path) -> list[str | Path]:
        calibrate = ("--samples", "8", "--sequence-length", "64", "--calibration-text", text, "--group-size", "16")
        form = ("--format", "bitmask-w4", "--pattern", "8:16")
        return ["compress", "--threads", "1", tiny("llama"), dst, *calibrate, *form]

    assert forks.run(*words(tmp_path / "whole")).code == 0
    ended = forks.run(*words(tmp_path / "out"), strike=Strike(4, "journal.jsonl"))
    assert ended.code == -signal.SIGKILL
    ended = forks.run(*words(tmp_path / "out"))
    assert ended.code == 0, ended.err
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert beside(tmp_path / "out") == []
