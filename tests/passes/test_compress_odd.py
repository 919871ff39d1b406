"""`compress` on sources that are odd, damaged or unlike their config: right, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.errors import Refusal
from rewright.passes.context import Silent
from rewright.passes.errors import BoundError, InputError, UsageError
from rewright.passes.loading import load
from rewright.passes.models.families import FAMILIES
from rewright.passes.pipeline import execute
from rewright.passes.recipe import make as make_stage
from rewright.passes.run_options import RunOptions
from rewright.passes.summary import summary
from rewright.passes.survey import Run
from tests.passes.compressing import QUICK, change, compress, logits, plain, plan_words, report
from tests.passes.conftest import PACKED, TINY, make


@pytest.mark.parametrize("shape", ["both stored", "head only", "embedding only"])
def test_tied_weights_are_stored_once(shape: str, tiny_copy: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    src = tiny_copy("llama-tied")
    tensors = load_file(src / "model.safetensors")
    expected = plain(src, dtype=torch.float32)
    if shape == "both stored":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    elif shape == "head only":
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    compress(src, tmp_path / "out", text, bits=8)
    names = Checkpoint.open(tmp_path / "out").entries
    assert "lm_head.weight" not in names
    assert names["model.embed_tokens.weight"].dtype == "F32"
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True
    assert float((plain(tmp_path / "out", dtype=torch.float32) - expected).norm() / expected.norm()) < 0.05


def test_tensors_that_no_model_knows_are_kept(tiny_copy: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    src = tiny_copy("llama")
    tensors = load_file(src / "model.safetensors")
    strange = {
        "mtp.fc.weight": torch.randn(8, 8).bfloat16(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file({**tensors, **strange}, src / "model.safetensors", metadata={"format": "pt"})
    compress(src, tmp_path / "out", text)
    kept = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in strange.items():
        assert kept[name].dtype == tensor.dtype
        assert torch.equal(kept[name], tensor)


def test_config_is_edited_and_the_rest_is_carried(tiny_copy: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    src = tiny_copy("llama")
    config = json.loads((src / "config.json").read_text())
    config.update(rope_theta=500000.0, a_key_of_tomorrow={"x": [1]})
    (src / "config.json").write_text(json.dumps(config))
    (src / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.9}')
    (src / "chat_template.jinja").write_text("{{ x }}")
    compress(src, tmp_path / "out", text)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert {**config, "quantization_config": written["quantization_config"]} == written
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (src / name).read_bytes()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "mtp.x"])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_values_that_are_not_finite_are_refused_by_name(
    name: str, method: str, tiny_copy: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    src = tiny_copy("llama")
    tensors = load_file(src / "model.safetensors")
    tensors.setdefault(name, torch.zeros(3))
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"`{name}`"):
        compress(src, tmp_path / "out", text, method=method)
    assert not (tmp_path / "out").exists()


def test_fp8_is_refused(tiny_copy: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    src = tiny_copy("llama")
    tensors = load_file(src / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"`{name}` is fp8"):
        compress(src, tmp_path / "out", text)
    with pytest.raises(InputError, match=f"`{name}` is fp8"):
        compress(src, tmp_path / "out", method="rtn")
    change(src, lambda held: held.update({name + "_scale_inv": torch.ones(1, 1)}))
    with pytest.raises(Refusal, match="fp8"):
        compress(src, tmp_path / "out", text)
    config = json.loads((src / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (src / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal, match="fp8"):
        compress(src, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


def test_mixed_files_keep_the_bytes_of_what_is_not_touched(
    tiny_copy: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    """A bfloat16 model with float32 norms: no cast of the whole file."""

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for stored, tensor in tensors.items():
            tensors[stored] = tensor + 1e-6 if "norm" in stored else tensor.bfloat16()

    src = change(tiny_copy("llama"), mix)
    compress(src, tmp_path / "out", text)
    before, after = (load_file(folder / "model.safetensors") for folder in (src, tmp_path / "out"))
    kept = [stored for stored in before if stored in after]
    assert {after[stored].dtype for stored in kept} == {torch.float32, torch.bfloat16}
    for stored in kept:
        assert after[stored].dtype == before[stored].dtype
        assert torch.equal(after[stored], before[stored])
    assert torch.isfinite(plain(tmp_path / "out", dtype=torch.bfloat16)).all()


def test_the_stated_scheme_is_the_smallest_and_what_is_added_is_read_past(
    tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    """Readers of some versions forbid what others write: the status is there, and nothing beyond need."""
    compress(tiny("llama"), tmp_path / "out", text)
    config = json.loads((tmp_path / "out/config.json").read_text())
    stated = config["quantization_config"]
    assert set(stated) == {"quant_method", "format", "quantization_status", "config_groups", "ignore"}
    assert stated["quantization_status"] == "compressed"
    for group in stated["config_groups"].values():
        assert set(group) == {"targets", "weights"}
        assert set(group["weights"]) == {"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"}
    expected = plain(tmp_path / "out", dtype=torch.float32)
    stated["x"] = 1
    stated["config_groups"]["group_0"]["weights"]["y"] = None
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    shown = summary(tmp_path / "out")
    assert shown["quantization"]["schemes"][0]["bits"] == 4
    assert not shown["warnings"]
    assert torch.equal(logits(load(tmp_path / "out")[0]), expected)


def test_columns_alike_and_rows_of_zeros(tiny_copy: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    """Inputs that repeat each other make the Hessian singular: it has a factor once it is damped."""
    src = tiny_copy("llama")
    tensors = load_file(src / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 1] = tensors["model.embed_tokens.weight"][:, 0]
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.input_layernorm.weight"][:2] = 1
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"][:2] = 0
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"][:2] = 0
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    _, warnings = compress(src, tmp_path / "out", text, damp=0.0)
    assert any("damping raised" in warning for warning in warnings)
    rows = report(tmp_path / "out")["matrices"]
    assert any(row["damp"] > 0 for row in rows)
    assert torch.isfinite(plain(tmp_path / "out", dtype=torch.float32)).all()


def test_inputs_that_never_come(tiny_copy: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    """A norm of zeros feeds nothing to its matrices: they are rounded, and the run says so."""
    src = tiny_copy("llama")
    tensors = load_file(src / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"].zero_()
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    _, warnings = compress(src, tmp_path / "out", text, sparsity=0.5)
    assert any("no calibration input reached `model.layers.1.mlp" in warning for warning in warnings)
    assert torch.isfinite(plain(tmp_path / "out", dtype=torch.float32)).all()


def test_float16_that_overflows_is_refused(tiny_copy: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    """Weights past what float16 holds: by name, before any work. Activations past it: by the layer."""
    src = tiny_copy("llama")
    tensors = load_file(src / "model.safetensors")
    large = {**tensors, "model.embed_tokens.weight": tensors["model.embed_tokens.weight"] * 1e6}
    save_file(large, src / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"`model.embed_tokens.weight` holds values past"):
        compress(src, tmp_path / "out", text, dtype="f16")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 5e4
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BoundError, match=r"activations .*`model.layers.0"):
        compress(src, tmp_path / "out", text, dtype="f16", force=True)
    assert not (tmp_path / "out").exists()


def test_float16_scales_do_not_underflow(tmp_path: Path, text: Path) -> None:
    src = make("llama", tmp_path / "src", torch.float16)
    tensors = load_file(src / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3] = 6e-8
    tensors["model.layers.0.mlp.up_proj.weight"][4] = 0
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    compress(src, tmp_path / "out", text)
    scale = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight_scale"]
    assert scale.dtype == torch.float16
    assert bool((scale > 0).all())
    assert torch.isfinite(plain(tmp_path / "out", dtype=torch.float16)).all()


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("group_size", [16, 48])
def test_sources_without_the_base_prefix(
    name: str, group_size: int, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    """Packed modules are found by a running model's names: the result has them, whatever the source is called."""
    shutil.copytree(tiny(name), tmp_path / "src")
    family = FAMILIES[TINY[name][0]]

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for stored in list(tensors):
            tensors[stored.removeprefix(family.base)] = tensors.pop(stored)

    src = change(tmp_path / "src", strip)
    compress(src, tmp_path / "out", text, group_size=group_size)
    compress(tiny(name), tmp_path / "named", text, group_size=group_size)
    expected = plain(tmp_path / "named", dtype=torch.float32)
    assert torch.equal(plain(tmp_path / "out", dtype=torch.float32), expected)
    assert torch.equal(logits(load(tmp_path / "out")[0]), logits(load(tmp_path / "named")[0]))


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("name", ["model.layers.2.eh_proj.weight", "model.layers.0.adapter.weight"])
def test_matrices_that_no_model_builds_are_kept(
    name: str, method: str, tiny_copy: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    strange = torch.randn(32, 64)
    src = change(tiny_copy("llama"), lambda tensors: tensors.update({name: strange}))
    compress(src, tmp_path / "out", text, method=method)
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[name], strange)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"vocab_size": 500}, "`vocab_size` 500, and `model.embed_tokens.weight` has 512 rows"),
        ({"num_hidden_layers": 3}, r"`model.layers.2.self_attn.q_proj.weight` is missing"),
        ({"intermediate_size": 96}, r"`model.layers.0.mlp.gate_proj.weight` has shape \[64, 32\]"),
        ({"hidden_act": "nosuch"}, "transformers cannot take"),
        ({"num_attention_heads": 0}, "transformers cannot take"),
    ],
    ids=str,
)
def test_configs_unlike_the_tensors_are_refused_before_any_work(
    wrong: dict[str, Any], said: str, method: str, tiny_copy: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    src = tiny_copy("llama")
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({**config, **wrong}))
    with pytest.raises(InputError, match=said):
        compress(src, tmp_path / "out", text if method == "gptq" else None, method=method)
    assert not list((tmp_path / "out.partial").rglob("*.safetensors"))


def test_a_layer_that_the_config_does_not_have_is_copied(
    tiny_copy: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    src = tiny_copy("llama")
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    compress(src, tmp_path / "out", text)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[name], load_file(src / "model.safetensors")[name])


def test_matrices_of_two_float_types(tiny_copy: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for stored, tensor in tensors.items():
            tensors[stored] = tensor.half() if "q_proj" in stored or "gate" in stored else tensor.bfloat16()

    src = change(tiny_copy("llama"), mix)
    compress(src, tmp_path / "out", text)
    scales = {t.dtype for n, t in load_file(tmp_path / "out/model.safetensors").items() if n.endswith("_scale")}
    assert scales == {torch.bfloat16}
    assert torch.isfinite(plain(tmp_path / "out", dtype=torch.bfloat16)).all()


@pytest.mark.parametrize("name", ["llama-tied", "gemma2"])
def test_copies_that_differ_are_not_tied(
    name: str, tiny_copy: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    """The config says tied, the file holds two tensors: plain transformers goes by the file, and so do we."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.01 * torch.randn(512, 32)

    src = change(tiny_copy(name), add)
    assert torch.equal(logits(load(src)[0]), plain(src, dtype=torch.float32))
    compress(src, tmp_path / "out", text)
    assert torch.equal(logits(load(tmp_path / "out")[0]), plain(tmp_path / "out", dtype=torch.float32))


def test_one_text_named_twice_is_used_once(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    (tmp_path / "again.txt").write_bytes(text.read_bytes())
    stage = make_stage(1, "compress", {**QUICK, "calibration-text": [str(text), str(tmp_path / "again.txt")]})
    reporter = Silent()
    execute(Run(tiny("llama"), tmp_path / "out", (stage,), RunOptions(threads=1)), reporter)
    assert any("one text" in warning for warning in reporter.warnings)
    documents = [part for part in text.read_text().split("<|endoftext|>") if part.strip()]
    assert report(tmp_path / "out")["calibration"]["documents"] == len(documents)


def test_a_compressed_source_is_refused(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    compress(tiny("llama"), tmp_path / "one", text)
    with pytest.raises(InputError, match="quantised already"):
        compress(tmp_path / "one", tmp_path / "two", text)


def test_text_and_tokenizer_that_are_not_enough(tiny_copy: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    src = tiny_copy("llama")
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time")
    with pytest.raises(InputError, match="less than one sequence of 64"):
        compress(src, tmp_path / "out", short)
    short.write_text("Once upon a time there was a cat.\n" * 40)
    _, warnings = compress(src, tmp_path / "out", short, force=True, samples=128)
    assert any("of the 128 sequences asked for" in warning for warning in warnings)
    facts = report(tmp_path / "out")["calibration"]
    assert facts["samples_asked"] == 128 > facts["samples_used"] >= 1
    (src / "tokenizer.json").unlink()
    (src / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        compress(src, tmp_path / "more", text)
    compress(src, tmp_path / "rounded", method="rtn")


def test_options_that_contradict_each_other() -> None:
    for said in (
        {"pattern": "2:4", "sparsity": 0.25, "method": "rtn"},
        {"bits": 16, "method": "rtn"},
        {"method": "magnitude"},
        {"bits": 4},
        {"bits": 5, "method": "rtn"},
        {"sparsity": 1.5, "method": "rtn"},
        {"method": "rtn", "skip": ["("]},
        {"method": "rtn", "skip": ["no_such_module"]},
    ):
        with pytest.raises(UsageError):
            plan_words(said)
