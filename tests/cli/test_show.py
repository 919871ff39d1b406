"""`show`, `diff` and `verify`, on small checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rewright.passes.compare import compare
from rewright.passes.kinds import kind_of
from rewright.passes.summary import summary
from tests.passes.compressing import compress
from tests.passes.conftest import make

MODEL = Path(__file__).parents[1] / "data" / "stories260K"


def _checkpoint(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} if config is None else config))
    return folder


def _llama(rows: int = 264) -> dict[str, torch.Tensor]:
    layer = "model.layers.0."
    return {
        "model.embed_tokens.weight": torch.ones(rows, 32),
        layer + "self_attn.q_proj.weight": torch.ones(32, 32),
        layer + "self_attn.rotary_emb.inv_freq": torch.ones(16),
        layer + "mlp.down_proj.weight": torch.ones(32, 64, dtype=torch.bfloat16),
        layer + "input_layernorm.weight": torch.ones(32),
        "model.norm.weight": torch.ones(32),
        "mtp.fc.weight": torch.ones(4, 4, dtype=torch.bfloat16),
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("transformer.wpe.weight", "embedding"),
        ("gpt_neox.embed_in.weight", "embedding"),
        ("model.decoder.embed_positions.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("embed_out.weight", "head"),
        ("model.layers.3.self_attn.q_proj.weight_packed", "attention"),
        ("model.layers.3.self_attn.q_norm.weight", "norm"),
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("transformer.h.0.ln_1.bias", "norm"),
        ("transformer.ln_f.weight", "norm"),
        ("transformer.h.0.mlp.c_fc.weight", "mlp"),
        ("gpt_neox.layers.0.attention.query_key_value.weight", "attention"),
        ("gpt_neox.layers.0.post_attention_layernorm.weight", "norm"),
        ("model.decoder.layers.0.fc1.weight", "mlp"),
        ("model.decoder.layers.0.self_attn_layer_norm.weight", "norm"),
        ("model.decoder.final_layer_norm.weight", "norm"),
        ("model.layers.0.block_sparse_moe.experts.1.w1.weight", "experts"),
        ("model.layers.0.mlp.experts.gate_up_proj", "experts"),
        ("model.layers.0.mlp.experts.down_proj_bias", "experts"),
        ("model.layers.0.mlp.router.weight", "mlp"),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", "mlp"),
        ("model.layers.0.pre_feedforward_layernorm.weight", "norm"),
        ("mtp.fc.weight", "mlp"),
        ("score.weight", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_summary_counts(tmp_path: Path) -> None:
    found = summary(_checkpoint(tmp_path / "m", _llama(), {"model_type": "llama", "vocab_size": 256}))
    assert found["tensors"] == 7
    assert found["parameters"] == 264 * 32 + 32 * 32 + 16 + 32 * 64 + 32 + 32 + 16
    assert found["tensor_bytes"] == 4 * (264 * 32 + 32 * 32 + 16 + 64) + 2 * (32 * 64 + 16)
    assert found["kinds"]["embedding"] == {
        "tensors": 1,
        "parameters": 8448,
        "bytes": 33792,
        "bits_per_weight": 32.0,
    }
    assert found["unknown"] == ["model.layers.0.self_attn.rotary_emb.inv_freq", "mtp.fc.weight"]
    assert found["embedding_rows"] == 264
    assert found["tokenizer_rows"] is None
    assert any("`vocab_size` 256" in warning for warning in found["warnings"])


@pytest.mark.parametrize(
    ("tokenizer", "rows"),
    [
        ({"model": {"vocab": {"a": 0, "b": 255}}}, 256),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 300, "content": "x"}]}, 301),
        ({"model": {"vocab": [["a", 0.0], ["b", -1.0]]}}, 2),
        ({}, None),
    ],
)
def test_tokenizer_rows(tmp_path: Path, tokenizer: dict[str, Any], rows: int | None) -> None:
    folder = _checkpoint(tmp_path / "m", _llama())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = summary(folder)
    assert (found["embedding_rows"], found["tokenizer_rows"]) == (264, rows)
    assert any("the tokenizer has 301 tokens" in warning for warning in found["warnings"]) == (rows == 301)


def test_a_broken_tokenizer_is_a_warning(tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path / "m", _llama())
    (folder / "tokenizer.json").write_text("{")
    assert summary(folder)["warnings"]


def test_packed_weights_count_as_what_they_decode_to(tmp_path: Path) -> None:
    module = "model.layers.0.mlp.down_proj"
    tensors = {
        "model.embed_tokens.weight": torch.zeros(8, 4),
        f"{module}.weight_packed": torch.zeros(32, 6, dtype=torch.int32),
        f"{module}.weight_scale": torch.zeros(32, 1, dtype=torch.bfloat16),
        f"{module}.weight_shape": torch.tensor([32, 43]),
    }
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 43}
    config = {
        "model_type": "llama",
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme, "x": 1}},
            "ignore": [],
            "x": 1,
        },
    }
    found = summary(_checkpoint(tmp_path / "m", tensors, config))
    assert found["kinds"]["mlp"]["parameters"] == 32 * 43
    assert found["kinds"]["mlp"]["bits_per_weight"] == pytest.approx(8 * (32 * 6 * 4 + 64 + 16) / (32 * 43))
    assert found["quantization"]["schemes"] == [
        {"bits": 4, "group_size": 43, "symmetric": True, "nnz": None, "matrices": 1}
    ]
    assert not found["unknown"]
    config["quantization_config"] = {"quant_method": "fp8"}
    other = summary(_checkpoint(tmp_path / "fp8", tensors, config))
    assert other["quantization"]["method"] == "fp8"
    assert any("fp8" in warning for warning in other["warnings"])


def _noise(dtype: torch.dtype) -> torch.Tensor:
    """A matrix a third of which is zeros, of either sign."""
    weight = torch.randn(32, 48)
    weight[torch.rand(32, 48) < 0.2] = 0.0
    weight[torch.rand(32, 48) < 0.2] = -0.0
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_zeros_of_dense_matrices_are_counted(dtype: torch.dtype, tmp_path: Path) -> None:
    layers = {
        f"model.layers.{i}.self_attn.{name}.weight": _noise(dtype) for i in (0, 1) for name in ("q_proj", "k_proj")
    }
    experts = {"model.layers.0.mlp.experts.down_proj": torch.stack([_noise(dtype)] * 3)}
    rest = {"model.embed_tokens.weight": torch.zeros(8, 48), "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    found = summary(_checkpoint(tmp_path / "m", {**layers, **experts, **rest}), count=True)
    zeros = {name: int((weight.double() == 0).sum()) for name, weight in {**layers, **experts}.items()}
    kinds = found["matrices"]
    assert set(kinds) == {"down_proj", "q_proj", "k_proj", "all"}
    for kind in ("q_proj", "k_proj", "down_proj"):
        assert kinds[kind]["zeros"] == sum(count for name, count in zeros.items() if kind in name)
    assert kinds["all"]["zeros"] == sum(zeros.values()) > 1000
    assert kinds["all"]["weights"] == 7 * 32 * 48
    assert kinds["all"]["bits_per_weight"] == 8 * dtype.itemsize
    takes = {"dense": 7 * 32 * 48 * dtype.itemsize, "embedding": 4 * 8 * 48, "rest": 4 * 32}
    assert {part: size for part, size in found["takes"].items() if size} == takes


@pytest.mark.parametrize(
    "said",
    [
        {"bits": 4, "pattern": "8:16"},
        {"bits": 4, "pattern": "8:16", "format": "bitmask-w4"},
        {"bits": 3, "sparsity": 0.3},
        {"bits": 8, "group-size": "channel"},
        {"bits": 4, "symmetric": False},
        {"bits": 2, "symmetric": False},
    ],
    ids=str,
)
def test_zeros_of_codes_are_counted(said: dict[str, Any], tmp_path: Path) -> None:
    made = compress(make("llama", tmp_path / "src"), tmp_path / "out", method="rtn", **said)[0]["stages"][0]["metrics"]
    found = summary(tmp_path / "out", count=True)
    whole = found["matrices"]["all"]
    assert whole["matrices"] == made["matrices"]
    assert whole["sparsity"] == pytest.approx(made["sparsity"], abs=1e-12)
    assert whole["bits_per_weight"] == pytest.approx(made["bits_per_weight"])
    assert sum(found["takes"].values()) == found["tensor_bytes"]
    assert found["takes"]["masks"] == (whole["weights"] // 8 if "format" in said else 0)
    assert not found["warnings"]
    nnz = {scheme["nnz"] for scheme in found["quantization"]["schemes"]}
    assert nnz == ({8} if "format" in said else {None})


def test_large_checkpoints_are_counted_when_asked(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(*words: str) -> bool:
        found = json.loads(call("show", str(MODEL), "--json", *words).out)
        return found["matrices"]["all"]["zeros"] is not None

    assert counted()
    assert not counted("--no-count")
    monkeypatch.setattr("rewright.passes.summary.COUNTED", 1000)
    assert not counted()
    assert counted("--count")
    assert "not counted" in call("show", str(MODEL)).out
    assert "0.00 %" in call("show", str(MODEL), "--count").out


def test_show(call: Any, tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path / "m", _llama())
    shutil.copy(MODEL / "tokenizer.json", folder)
    ended = call("show", str(folder))
    assert ended.code == 0
    assert "embedding 264 rows, tokenizer 512" in ended.out
    assert "2 tensors that no family names" in ended.out
    assert "warning: the tokenizer has 512 tokens, the embedding only 264 rows" in ended.err
    assert json.loads(call("show", str(folder), "--json").out)["embedding_rows"] == 264
    lone = call("show", str(folder / "model.safetensors"))
    assert lone.code == 0


@pytest.mark.parametrize(
    ("words", "code"),
    [(("show", "nothing"), 3), (("show", str(MODEL), "--as", "toml"), 3), (("show", str(MODEL), "--as", "x"), 2)],
)
def test_show_refuses(call: Any, words: tuple[str, ...], code: int) -> None:
    ended = call(*words)
    assert (ended.code, ended.out) == (code, "")


def test_diff_of_equals(call: Any, tmp_path: Path) -> None:
    one = _checkpoint(tmp_path / "a", _llama())
    shutil.copytree(one, tmp_path / "b")
    ended = call("diff", str(one), str(tmp_path / "b"))
    assert (ended.code, ended.out) == (0, "equal\n")
    found = compare(one, tmp_path / "b")
    assert found["equal"]
    assert found["tensors"]["equal"] == 7


def test_diff_finds_everything(call: Any, tmp_path: Path) -> None:
    a, b = _llama(), _llama()
    del a["model.norm.weight"]
    del b["mtp.fc.weight"]
    b["model.embed_tokens.weight"][5, 5] = 1.5
    b["model.layers.0.input_layernorm.weight"] = torch.ones(33)
    b["model.layers.0.mlp.down_proj.weight"] = torch.ones(32, 64)
    one = _checkpoint(tmp_path / "a", a, {"model_type": "llama", "x": {"y": 1, "z": None}, "same": [1]})
    other = _checkpoint(tmp_path / "b", b, {"model_type": "llama", "x": {"y": 1.0}, "same": [1]})
    (one / "extra").write_text("1")
    (one / "both").write_text("1")
    (other / "both").write_text("2")
    found = json.loads(call("diff", str(one), str(other), "--json").out)
    assert not found["equal"]
    assert found["config"] == {"x.y": {"a": 1, "b": 1.0}, "x.z": {"a": None}}
    assert found["tensors"]["only_a"] == ["mtp.fc.weight"]
    assert found["tensors"]["only_b"] == ["model.norm.weight"]
    assert found["sidecars"] == {"both": "differs", "extra": "only in A"}
    changed = {item.pop("name"): item for item in found["tensors"]["changed"]}
    assert changed["model.embed_tokens.weight"]["max_difference"] == 0.5
    assert changed["model.embed_tokens.weight"]["relative_difference"] == pytest.approx(0.5 / (264 * 32) ** 0.5)
    assert changed["model.layers.0.input_layernorm.weight"] == {
        "a": "F32 [32]",
        "b": "F32 [33]",
        "max_difference": None,
        "relative_difference": None,
    }
    assert changed["model.layers.0.mlp.down_proj.weight"]["max_difference"] == 0
    told = call("diff", str(one), str(other)).out
    for text in ("config x.z: null -> absent", "tensor mtp.fc.weight: only in A", "file both: differs", "0.5"):
        assert text in told


def test_diff_of_what_no_number_fits(tmp_path: Path) -> None:
    one = _checkpoint(
        tmp_path / "a", {"x": torch.tensor([1.0, float("nan")]), "y": torch.zeros(0, 4), "z": torch.tensor(1)}
    )
    other = _checkpoint(tmp_path / "b", {"x": torch.tensor([1.0, 2.0]), "y": torch.zeros(0, 4), "z": torch.tensor(3)})
    changed = {item["name"]: item for item in compare(one, other)["tensors"]["changed"]}
    assert changed.keys() == {"x", "z"}
    assert changed["x"]["max_difference"] != changed["x"]["max_difference"]
    assert (changed["z"]["max_difference"], changed["z"]["relative_difference"]) == (2.0, 2.0)


def test_verify(call: Any, tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path / "m", _llama())
    ended = call("verify", str(folder))
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("sound: 2 files, 7 tensors")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    broken = call("verify", str(folder))
    assert broken.code == 3
    assert "is not sound" in broken.err
    assert "model.safetensors" in broken.out
    report = json.loads(call("verify", str(folder), "--json").out)
    assert (report["ok"], len(report["problems"])) == (False, len(broken.out.splitlines()))
