"""`compress` end to end: what it writes is what plain transformers reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.errors import Refusal
from rewright.kernels.pack import unpack
from rewright.passes.context import RunOptions, Silent
from rewright.passes.errors import BoundError, InputError, UsageError
from rewright.passes.loading import load
from rewright.passes.models.families import FAMILIES
from rewright.passes.pipeline import Run, execute, plan
from rewright.passes.recipe import make as make_stage
from tests.passes.conftest import STORIES, TINY, make

QUICK = {"samples": 8, "sequence-length": 64, "group-size": 16}


def compress(src: Path, dst: Path, text: Path | None = None, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """Run the pass; the run's document and its warnings."""
    run_options = {key: options.pop(key) for key in ("seed", "dtype", "force") if key in options}
    plain = {**QUICK, **{key.replace("_", "-"): value for key, value in options.items()}}
    if text is not None:
        plain["calibration-text"] = [str(text)]
    reporter = Silent()
    stage = make_stage(1, "compress", plain)
    return execute(Run(src, dst, (stage,), RunOptions(threads=1, **run_options)), reporter), reporter.warnings


def report(dst: Path) -> dict[str, Any]:
    return json.loads((dst / "reports/compress.json").read_text())


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(3, 512, (3, 33), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def plain(path: Path, **options: Any) -> torch.Tensor:
    """Logits through transformers alone."""
    return logits(AutoModelForCausalLM.from_pretrained(path, **options).eval())


@pytest.mark.parametrize("name", [name for name in TINY if name != "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_packed(
    name: str, dtype: torch.dtype, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    src = tiny(name) if dtype == torch.float32 else make(name, tmp_path / "bf16", dtype)
    document, warnings = compress(src, tmp_path / "out", text, sparsity=0.25)
    assert document["state"] == "done"
    assert not warnings
    assert torch.equal(plain(tmp_path / "out", dtype=dtype), logits(load(tmp_path / "out")[0]))
    if dtype == torch.float32:
        dense, ours = plain(src, dtype=dtype), plain(tmp_path / "out", dtype=dtype)
        assert not torch.equal(dense, ours)
        assert float((dense - ours).norm() / dense.norm()) < 0.7


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


def zeros(folder: Path) -> dict[str, int]:
    """Zero codes of each packed matrix, counted from the file."""
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name in tensors:
        if name.endswith(".weight_packed"):
            shape = tensors[name.replace("_packed", "_shape")]
            found[name] = int((unpack(tensors[name], 4, int(shape[1])) == 0).sum())
    return found


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
    config = json.loads((src / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (src / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal, match="fp8"):
        compress(src, tmp_path / "out", text)


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


def change(src: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Edit a checkpoint's tensors in place."""
    tensors = load_file(src / "model.safetensors")
    edit(tensors)
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    return src


@pytest.mark.parametrize("name", [name for name in TINY if name != "gpt2"])
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
    assert torch.equal(logits(load(tmp_path / "out")[0]), expected)


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


def test_the_reported_error_is_that_of_the_decoded_weights(tmp_path: Path, text: Path) -> None:
    """In a bfloat16 model decoding rounds once more, which at 8 bits is much of the error."""
    src = make("llama", tmp_path / "src", torch.bfloat16)
    compress(src, tmp_path / "packed", text, bits=8)
    compress(src, tmp_path / "dense", text, bits=8, format="dense")
    for one, other in zip(report(tmp_path / "packed")["matrices"], report(tmp_path / "dense")["matrices"], strict=True):
        if one["layer"] == 0:
            assert abs(one["error_calibration"] / other["error_calibration"] - 1) < 1e-3


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


def plan_words(said: dict[str, Any]) -> None:
    stage = make_stage(1, "compress", said)
    plan(Run(STORIES, Path("/nowhere/out"), (stage,), RunOptions()))


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


def test_second_order_beats_rounding_on_a_real_model(tmp_path: Path, text: Path) -> None:
    """On held-out tokens of a real model: GPTQ below RTN, the joint sweep below magnitude and rounding."""
    errors = {}
    for name, options in {
        "gptq": {},
        "rtn": {"method": "rtn"},
        "joint": {"sparsity": 0.5},
        "wanda": {"sparsity": 0.5, "method": "wanda"},
        "magnitude": {"sparsity": 0.5, "method": "rtn"},
    }.items():
        document, _ = compress(STORIES, tmp_path / name, text, group_size=32, samples=24, **options)
        errors[name] = document["stages"][0]["metrics"]["error_held_out"]
    assert errors["gptq"] < 0.8 * errors["rtn"]
    assert errors["joint"] < 0.8 * errors["wanda"] < 0.8 * errors["magnitude"]
