"""Layers with experts: read, watched, compressed, and refused where plain transformers would read noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rewright.formats.checkpoint import Checkpoint
from rewright.passes.compress import output
from rewright.passes.errors import InputError
from rewright.passes.layer import Layer
from rewright.passes.loading import Assembly, load
from rewright.passes.summary import summary
from rewright.passes.walk import Walk
from tests.passes.compressing import change, compress, logits, plain, report
from tests.passes.conftest import EXPERTS, make

MOE = [*EXPERTS, "gpt_oss"]
CPU = torch.device("cpu")


def layers(path: Path, **options: Any) -> Walk:
    tokens = torch.randint(3, 512, (4, 40), generator=torch.Generator().manual_seed(3))
    return Walk(Assembly(Checkpoint.open(path), torch.float32, CPU), tokens, **options)


def first(path: Path) -> Layer:
    return next(iter(layers(path)))


@pytest.fixture
def fused(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A tiny checkpoint with each layer's experts in two tensors."""

    def get(name: str) -> Path:
        model = AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32)
        model.save_pretrained(tmp_path / "fused", save_original_format=False)
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            (tmp_path / "fused" / file).write_bytes((tiny(name) / file).read_bytes())
        assert "model.layers.0.mlp.experts.gate_up_proj" in Checkpoint.open(tmp_path / "fused").entries
        return tmp_path / "fused"

    return get


@pytest.mark.parametrize("name", EXPERTS)
def test_both_forms_of_files_are_one_model(
    name: str, tiny: Callable[[str], Path], fused: Callable[[str], Path]
) -> None:
    apart, joined = load(tiny(name))[0], load(fused(name))[0]
    assert torch.equal(logits(apart), logits(joined))
    slots = first(joined_path := fused(name)).linears
    assert "mlp.experts.gate_up_proj[3]" in slots
    assert not any("experts.0." in path for path in slots), joined_path


def test_experts_that_are_missing_or_odd_are_named(tiny_copy: Callable[[str], Path]) -> None:
    src = tiny_copy("mixtral")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    held = load_file(src / "model.safetensors")[name]
    change(src, lambda tensors: tensors.update({name: held[:5].clone()}))
    with pytest.raises(InputError, match=f"`{name}` has shape"):
        load(src)
    change(src, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(InputError, match=f"`{name}` is missing"):
        load(src)


@pytest.mark.parametrize("name", MOE)
def test_experts_are_seen_with_the_tokens_routed_to_them(name: str, tiny: Callable[[str], Path]) -> None:
    """What goes into the second matrices and comes out of them, weighed as routed, is what the module returns."""
    # as many rows at a time as the hook sees, held out so that outputs are there
    walk = layers(tiny(name), dense_from=0, samples=0)
    layer = next(iter(walk))
    module = layer.module.get_submodule("mlp.experts")
    calls: list[tuple[torch.Tensor, ...]] = []

    def hook(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        calls.append((*args, output))

    handle = module.register_forward_hook(hook)
    layer.walk.run_layer(layer.index, layer.walk.hidden("compressed", slice(0, 4)))
    handle.remove()
    ((hidden, chosen, weights, output),) = calls
    (batch,) = list(layer.meet([path for path in layer.linears if "experts" in path], dense=True))
    total = torch.zeros_like(output)
    for expert in range(4):
        tokens, place = torch.where(chosen == expert)
        firsts = [path for path in batch.seen if _is(path, expert) and "down" not in path and "w2" not in path]
        for path in firsts:
            assert torch.equal(batch.seen[path]["compressed"].inputs, hidden[tokens])
        (second,) = [path for path in batch.seen if _is(path, expert) and path not in firsts]
        total.index_add_(0, tokens, batch.seen[second]["compressed"].outputs * weights[tokens, place, None])
    assert torch.allclose(total, output, atol=1e-5)


def _is(path: str, expert: int) -> bool:
    return f".{expert}." in path or f"[{expert}]" in path


@pytest.mark.parametrize("name", MOE)
def test_one_expert_is_replaced_and_put_back(name: str, tiny: Callable[[str], Path]) -> None:
    walk = layers(tiny(name), dense_from=0)
    # as many rows at a time as the oracle has
    walk.batches = [slice(0, 4)]
    oracle = AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32).eval()
    for layer in walk:
        if layer.index == 0:
            paths = [path for path in layer.linears if _is(path, 1)]
            kept = {path: layer.weight(path).clone() for path in layer.linears}
            for path in paths:
                layer.replace(path, torch.zeros_like(layer.weight(path)))
            layer.restore(paths[0])
            assert torch.equal(layer.weight(paths[0]), kept[paths[0]])
            assert not layer.weight(paths[-1]).any()
            for path in layer.linears.keys() - set(paths):
                assert torch.equal(layer.weight(path), kept[path])
    everything = slice(0, 4)
    with torch.no_grad():
        assert torch.equal(walk.logits("dense", everything), oracle(input_ids=walk.tokens, use_cache=False).logits)
        oracle.model.layers[0].mlp.experts.down_proj.data[1] = 0
        changed = oracle(input_ids=walk.tokens, use_cache=False).logits
    assert torch.equal(walk.logits("compressed", everything), changed)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("options", [{}, {"bits": 3}, {"bits_for": ["experts=8"]}, {"group_size": "channel"}], ids=str)
def test_plain_transformers_decodes_the_same_experts(
    name: str, options: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    # transformers 5.17 leaves the dtype of tensors that it renames, so it has to be the model's own
    src = make(name, tmp_path / "src", torch.bfloat16)
    compress(src, tmp_path / "out", text, **options)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = load(tmp_path / "out")[0]
    for path, parameter in ours.named_parameters():
        if "experts" in path:
            assert torch.equal(theirs.get_parameter(path).float(), parameter)
    both = plain(tmp_path / "out", dtype=torch.bfloat16), logits(load(tmp_path / "out", torch.bfloat16)[0])
    assert torch.equal(*both)


def test_one_group_size_for_all_experts(tmp_path: Path, text: Path) -> None:
    """Widths 32 and 36 share divisors up to 4; other matrices have groups of their own."""
    src = make("mixtral", tmp_path / "src", torch.bfloat16, intermediate_size=36)
    compress(src, tmp_path / "out", text, group_size=4)
    compress(src, tmp_path / "rows", text, group_size=32)
    for folder, size in (("out", 4), ("rows", "channel")):
        rows = report(tmp_path / folder)["matrices"]
        assert {row["group_size"] for row in rows if "experts" in row["name"]} == {size}
        # without grouped products, which want widths of eight numbers
        ours = load(tmp_path / folder, torch.bfloat16)[0]
        ours.set_experts_implementation("eager")
        theirs = plain(tmp_path / folder, dtype=torch.bfloat16, experts_implementation="eager")
        assert torch.equal(theirs, logits(ours))
    assert {row["group_size"] for row in rows if "experts" not in row["name"]} == {32}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"skip": [r"experts\.2\."]}, r"experts\.2\.w1` left as it is"),
        ({"skip": [r"layers\.1\..*experts"]}, r"layers\.1\..*` left as it is"),
        ({"bits_for": [r"experts\.3\.w2=8"]}, "`.*w1` is 4 bits, `.*experts.3.w2` 8 bits"),
        ({"skip": ["experts"]}, r"experts\.0\.w1` in 16 bits beside packed"),
        ({"bits": 16, "bits_for": ["self_attn=4"]}, r"experts\.0\.w1` in 16 bits beside packed"),
        ({"symmetric": False}, "packed experts with zero points"),
    ],
    ids=str,
)
def test_experts_that_would_be_noise_are_refused(
    options: dict[str, Any], said: str, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        compress(tiny("mixtral"), tmp_path / "out", text, **options)
    assert "`--format dense`" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
    compress(tiny("mixtral"), tmp_path / "out", text, format="dense", **options)
    assert torch.equal(plain(tmp_path / "out", dtype=torch.float32), logits(load(tmp_path / "out")[0]))


@pytest.mark.parametrize("name", MOE)
def test_experts_in_one_tensor(name: str, fused: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    """Packed they are refused, but for all of them left alone; dense they are compressed along their inputs."""
    src = fused(name)
    with pytest.raises(
        InputError, match=r"packed experts from one tensor, as `model\.layers\.0\.mlp\.experts"
    ) as caught:
        compress(src, tmp_path / "out", text)
    assert "`--skip experts`" in str(caught.value.hint)
    compress(src, tmp_path / "left", text, skip=["experts"])
    assert torch.equal(plain(tmp_path / "left", dtype=torch.float32), logits(load(tmp_path / "left")[0]))
    compress(src, tmp_path / "out", text, format="dense", group_size=16)
    assert torch.equal(plain(tmp_path / "out", dtype=torch.float32), logits(load(tmp_path / "out")[0]))
    before, after = (load_file(folder / "model.safetensors") for folder in (src, tmp_path / "out"))
    for path, tensor in after.items():
        if "experts" in path and tensor.ndim == 3:
            turned = tensor.transpose(1, 2) if name == "gpt_oss" else tensor
            groups = turned.reshape(-1, 16)
            assert max(len(torch.unique(group)) for group in groups[:64]) <= 15
            assert len(torch.unique(turned[0, :, 0])) > 15
        elif "experts" in path or "router" in path or ".gate." in path:
            assert torch.equal(tensor, before[path])
    counted = [row for row in report(tmp_path / "out")["matrices"] if "experts" in row["name"]]
    assert len(counted) == 4 * sum("experts" in path and tensor.ndim == 3 for path, tensor in after.items())
    assert all(row["tokens"] > 0 and 0 < row["error_calibration"] < 0.1 for row in counted)


@pytest.mark.parametrize("name", EXPERTS)
def test_both_forms_are_rounded_alike(
    name: str, tiny: Callable[[str], Path], fused: Callable[[str], Path], tmp_path: Path
) -> None:
    compress(tiny(name), tmp_path / "apart", method="rtn", format="dense")
    compress(fused(name), tmp_path / "joined", method="rtn", format="dense")
    assert torch.equal(plain(tmp_path / "apart", dtype=torch.float32), plain(tmp_path / "joined", dtype=torch.float32))


def _starve(src: Path) -> Path:
    """No token takes the way of expert 3 in the first layer: a large channel that is always there forbids it."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][:, 0] = 8
        tensors["model.layers.0.mlp.gate.weight"][3] = 0
        tensors["model.layers.0.mlp.gate.weight"][3, 0] = -20
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.0.{name}.weight"].fill_(1)

    return change(src, edit)


@pytest.mark.parametrize("options", [{}, {"sparsity": 0.5}, {"method": "wanda", "pattern": "2:4"}], ids=str)
def test_experts_that_no_token_reached(
    options: dict[str, Any], tiny_copy: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    src = _starve(tiny_copy("qwen3_moe"))
    document, warnings = compress(src, tmp_path / "out", text, **options)
    assert document["state"] == "done"
    rows = {row["name"]: row for row in report(tmp_path / "out")["matrices"]}
    starved = [name for name, row in rows.items() if row["tokens"] == 0]
    assert sum(name.startswith("model.layers.0.mlp.experts.3.") for name in starved) == 3
    assert all("experts" in name for name in starved)
    for name, row in rows.items():
        if name in starved:
            assert row["rounded"] is True
            assert row["error_calibration"] is None
        if options and "sparsity" in options:
            assert row["zeros"] >= row["rows"] * row["columns"] // 2
    count = sum(row.get("rounded", False) for row in rows.values())
    assert len(warnings) == 1
    assert f"{count} matrices of experts saw fewer tokens" in warnings[0]
    tensors = load_file(tmp_path / "out/model.safetensors")
    for name in starved:
        scale = tensors[name.replace(".weight", ".weight_scale")]
        assert bool((torch.isfinite(scale) & (scale > 0)).all())
    both = plain(tmp_path / "out", dtype=torch.bfloat16), logits(load(tmp_path / "out", torch.bfloat16)[0])
    assert torch.equal(*both)
    assert bool(torch.isfinite(both[0]).all())


def test_experts_with_fewer_tokens_than_columns(text: Path, tmp_path: Path) -> None:
    src = make("mixtral", tmp_path / "src", torch.bfloat16)
    _, warnings = compress(src, tmp_path / "out", text, samples=2, sequence_length=32)
    rows = [row for row in report(tmp_path / "out")["matrices"] if "experts" in row["name"]]
    few = [row for row in rows if row["rounded"]]
    assert few
    assert all(row["rounded"] == (row["tokens"] < row["columns"]) for row in rows)
    assert sum(f"{len(few)} matrices of experts saw fewer tokens" in warning for warning in warnings) == 1
    assert torch.isfinite(plain(tmp_path / "out", dtype=torch.bfloat16)).all()


@pytest.mark.parametrize("options", [{"sequential": "layer"}, {"target": "own", "mask": "sweep", "refine": 0}], ids=str)
def test_other_methods_take_experts(
    options: dict[str, Any], tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    compress(tiny("qwen3_moe"), tmp_path / "out", text, sparsity=0.5, **options)
    both = plain(tmp_path / "out", dtype=torch.bfloat16), logits(load(tmp_path / "out", torch.bfloat16)[0])
    assert torch.equal(*both)


def test_routers_stay_and_are_left_out_by_name(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    compress(tiny("mixtral"), tmp_path / "out", text)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny("mixtral"), tmp_path / "out"))
    name = "model.layers.1.block_sparse_moe.gate"
    assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
    stated = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert set(stated["ignore"]) == {"lm_head", name, name.replace("1", "0")}


@pytest.mark.parametrize("name", MOE)
def test_show_counts_the_bits_of_experts(name: str, tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    before = summary(tiny(name))["kinds"]["experts"]
    compress(tiny(name), tmp_path / "out", text, format="dense" if name == "gpt_oss" else "pack-quantized")
    after = summary(tmp_path / "out")["kinds"]["experts"]
    assert before["parameters"] == after["parameters"]
    assert before["bits_per_weight"] == 32
    assert after["bits_per_weight"] == 32 if name == "gpt_oss" else after["bits_per_weight"] < 7


def test_experts_past_those_of_the_config_are_copied(
    tiny_copy: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    strange = {f"model.layers.0.block_sparse_moe.experts.4.{part}.weight": torch.randn(8, 8) for part in ("w1", "w2")}
    src = change(tiny_copy("mixtral"), lambda tensors: tensors.update(strange))
    compress(src, tmp_path / "out", text)
    kept = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in strange.items())


def test_a_config_that_does_not_count_experts_is_refused(tiny_copy: Callable[[str], Path], tmp_path: Path) -> None:
    src = tiny_copy("mixtral")
    config = json.loads((src / "config.json").read_text())
    del config["num_local_experts"]
    (src / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="how many experts"):
        compress(src, tmp_path / "out", method="rtn")


@pytest.mark.parametrize(("method", "after"), [("rtn", 11), ("gptq", 20)])
def test_interrupted_in_the_middle_of_a_tensor(
    method: str,
    after: int,
    tiny: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The parts that were written are kept, or the layer is done again: the bytes are those of a run in one go."""
    read = text if method == "gptq" else None
    compress(tiny("gpt_oss"), tmp_path / "whole", read, method=method, format="dense")
    write, calls = output.write, iter(range(1000))

    def stop(*args: Any) -> dict[str, Any]:
        if next(calls) == after:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(output, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(tiny("gpt_oss"), tmp_path / "out", read, method=method, format="dense")
    compress(tiny("gpt_oss"), tmp_path / "out", read, method=method, format="dense")
    assert next(calls) - after - 1 < len(report(tmp_path / "out")["matrices"])
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(tensor, other[path]) for path, tensor in one.items())
