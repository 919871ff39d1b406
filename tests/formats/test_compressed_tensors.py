"""pack-quantized: what we write, compressed-tensors reads and plain transformers runs; what we cannot read we say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.compressed_tensors import Quantization, Scheme, packed_specs, parse, quantization_config
from rewright.formats.draft import Draft, TensorSpec
from rewright.formats.dtypes import to_torch
from rewright.formats.errors import FormatError
from rewright.formats.foreign import refuse_scaled

W4 = Scheme(4, 32)
MODULES = [f"model.layers.{at}.mlp.{part}" for at in range(2) for part in ("up_proj", "gate_proj", "down_proj")]


def config(**changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    raw: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights | changes.pop("weights", {})}},
        "ignore": ["lm_head"],
    }
    raw["config_groups"]["group_0"] |= changes.pop("group", {})
    return {"quantization_config": raw | changes}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("shape", "group"), [((6, 64), 32), ((5, 33), 11), ((7, 40), None), ((1, 1), 1)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_shapes_are_the_compressors(bits: int, shape: tuple[int, int], group: int | None, symmetric: bool) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = Scheme(bits, group, symmetric)
    weights = quantization_config({"m": scheme}, [])["config_groups"]["group_0"]
    groups = shape[1] // group if group else 1
    state = {
        "weight": torch.randn(shape),
        "weight_scale": torch.ones(shape[0], groups, dtype=torch.bfloat16),
        "weight_zero_point": torch.zeros(shape[0], groups, dtype=torch.int8),
    }
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    theirs = compressor.compress(state, QuantizationScheme.model_validate(weights))
    ours = {spec.name.removeprefix("m."): spec for spec in packed_specs("m", shape, scheme, "BF16")}
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tuple(tensor.shape), name
        assert to_torch(ours[name].dtype) == tensor.dtype


@pytest.mark.parametrize(
    ("shape", "scheme", "dtype", "words"),
    [
        ((4, 30), W4, "BF16", "`m`: groups of 32 do not divide 30 columns"),
        ((4,), W4, "BF16", "only matrices"),
        ((2, 4, 32), W4, "BF16", "only matrices"),
        ((4, 32), W4, "F64", "scales are stored as"),
        ((4, 32), Scheme(9, 32), "BF16", "9 bits"),
        ((4, 32), Scheme(4, 0), "BF16", "groups of 0"),
    ],
)
def test_specs_refuse(shape: tuple[int, ...], scheme: Scheme, dtype: str, words: str) -> None:
    with pytest.raises(FormatError) as caught:
        packed_specs("m", shape, scheme, dtype)
    assert words in str(caught.value)


def test_config_is_the_smallest() -> None:
    raw = quantization_config(dict.fromkeys(MODULES, W4), ["lm_head", "lm_head"])
    assert raw == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 32,
                    "dynamic": False,
                },
            }
        },
        "ignore": ["lm_head"],
    }
    with pytest.raises(FormatError, match="no quantised module"):
        quantization_config({}, [])


def theirs_of(raw: dict[str, Any], modules: list[str]) -> dict[str, Scheme | None]:
    """Which scheme compressed-tensors itself gives each linear module."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = torch.nn.Module()
    for name in modules:
        at = model
        *parents, last = name.split(".")
        for part in parents:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = at.get_submodule(part)
        at.add_module(last, torch.nn.Linear(64, 32))
    apply_quantization_config(model, QuantizationConfig.model_validate(raw))
    found: dict[str, Scheme | None] = {}
    for name in modules:
        scheme = getattr(model.get_submodule(name), "quantization_scheme", None)
        weights = scheme and scheme.weights
        size = weights and (weights.group_size if weights.strategy == "group" else None)
        found[name] = weights and Scheme(weights.num_bits, size, weights.symmetric)
    return found


def test_resolution_is_compressed_tensors() -> None:
    modules = [*MODULES, "lm_head", "vision.up_proj", "model.layers.0.mlp.experts.3.w1"]
    schemes = dict.fromkeys(MODULES, W4) | {
        MODULES[1]: Scheme(8, None),
        MODULES[5]: Scheme(8, None),
        MODULES[2]: Scheme(2, 64, False),
        "model.layers.0.mlp.experts.3.w1": Scheme(3, 16),
    }
    raw = quantization_config(schemes, ["lm_head", "re:vision.*"])
    read = parse({"quantization_config": raw})
    assert read is not None
    ours = {name: read.scheme_of(name) for name in modules}
    assert ours == schemes | {"lm_head": None, "vision.up_proj": None}
    assert ours == theirs_of(raw, modules)


def test_resolution_of_overlapping_targets() -> None:
    def group(bits: int, *targets: str) -> dict[str, Any]:
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
        return {"targets": list(targets), "weights": weights}

    raw = config()["quantization_config"] | {
        "config_groups": {
            "a": group(2, "Linear", "re:.*up_proj"),
            "b": group(3, "re:.*layers.1.*", "re:.*gate"),
            "c": group(4, MODULES[0], "re:.*gate"),
            "d": {"targets": ["re:.*down_proj"], "weights": None},
        }
    }
    read = parse({"quantization_config": raw})
    assert read is not None
    assert {name: read.scheme_of(name) for name in MODULES} == theirs_of(raw, MODULES)


def test_experts_group_is_found() -> None:
    """Experts are decoded with one group, which transformers looks for by pattern; others are left to exact names."""
    from compressed_tensors.quantization import QuantizationConfig
    from transformers.integrations.compressed_tensors import get_experts_scheme

    experts = {f"model.layers.0.mlp.experts.{at}.w{part}": Scheme(3, 16) for at in range(2) for part in (1, 2)}
    dense = {f"model.layers.{at}.self_attn.q_proj": W4 for at in range(9)}
    for schemes in (experts | dense, experts | {"model.layers.0.mlp.shared_experts.w1": W4}):
        parsed = QuantizationConfig.model_validate(quantization_config(schemes, []))
        assert get_experts_scheme(parsed).weights.num_bits == 3


def test_unknown_fields_are_kept() -> None:
    read = parse(config(x=1, version="0.20.0", sparsity_config={}, ignore=None, weights={"y": 2, "actorder": None}))
    assert isinstance(read, Quantization)
    assert read.raw["x"] == 1
    assert read.scheme_of("a.b") == Scheme(4, 128)
    nested = {"text_config": config()}
    assert parse(nested) is not None
    assert parse({}) is None
    assert parse({"quantization_config": None}) is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"quant_method": "fp8"}, "quantised by `fp8`"),
        ({"quant_method": "gptq"}, "quantised by `gptq`"),
        ({"quant_method": None}, "quantised by `None`"),
        ({"weights": {"type": "float", "num_bits": 8}}, "holds fp8 weights"),
        ({"weights": {"type": "float", "num_bits": 4}}, "holds fp4 weights"),
        ({"format": "int-quantized"}, "stored as `int-quantized`"),
        ({"format": "float-quantized", "weights": {"type": "float", "num_bits": 8}}, "holds fp8 weights"),
        ({"group": {"format": "naive-quantized"}}, "stored as `naive-quantized`"),
        ({"group": {"input_activations": {"num_bits": 8}}}, "quantises activations"),
        ({"weights": {"actorder": "group"}}, "columns out of order"),
        ({"weights": {"strategy": "tensor", "group_size": None}}, "one scale a `tensor`"),
        ({"weights": {"strategy": "block", "group_size": None}}, "one scale a `block`"),
    ],
)
def test_foreign_formats_say_what_to_do(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse(config(**changed))
    assert words in str(caught.value)
    assert "unquantised" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "raw",
    [
        {"quantization_config": []},
        config(config_groups=None),
        config(config_groups={"a": 1}),
        config(config_groups={"W4A16": ["Linear"]}),
        config(ignore="lm_head"),
        config(weights={"num_bits": "4"}),
        config(weights={"num_bits": 16}),
        config(weights={"num_bits": True}),
        config(group={"targets": None}),
        config(group={"weights": 4}),
    ],
)
def test_broken_configs(raw: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        parse(raw)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.weight", "a.weight_scale_inv"], "fp8"),
        (["a.weight", "a.weight_scale"], "scale of its own"),
        (["experts.gate_up_proj", "experts.gate_up_proj_scale_inv"], "fp8 with block scales"),
        (["experts.gate_up_proj", "experts.gate_up_proj_scale"], "scale of its own"),
        (["a.qweight", "a.qzeros", "a.scales"], "GPTQ or AWQ"),
        (["a.weight", "a.weight.absmax", "a.weight.quant_map"], "bitsandbytes"),
        (["mlp.experts.down_proj_blocks", "mlp.experts.down_proj_scales"], "mxfp4"),
        (["a.weight_packed", "a.weight_scale", "a.weight_shape"], "pack-quantized"),
    ],
)
def test_no_value_without_its_scale(names: list[str], words: str) -> None:
    with pytest.raises(FormatError, match=f"tensor `{names[0]}` is quantised") as caught:
        refuse_scaled(names)
    assert words in str(caught.value)
    assert caught.value.hint


def test_plain_tensors_are_plain(root: Path) -> None:
    refuse_scaled(Checkpoint.open(root / "tests/data/stories260K").entries)
    refuse_scaled(["a.weight", "b.weight_scale", "logit_scale", "layer_scale.weight"])


def test_broken_pattern() -> None:
    read = parse(config(ignore=["re:("]))
    assert read is not None
    with pytest.raises(FormatError, match="no pattern"):
        read.scheme_of("a")


@pytest.mark.parametrize("other", [Scheme(8, None), Scheme(3, 16)])
def test_plain_transformers_reads_it(other: Scheme, root: Path, tmp_path: Path) -> None:
    """A real model, packed by the library's own compressor into our files: logits of the rounded model."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from transformers import AutoModelForCausalLM

    src = Checkpoint.open(root / "tests/data/stories260K")
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    schemes: dict[str, Scheme] = {}
    packed: dict[str, torch.Tensor] = {}
    dense: dict[str, torch.Tensor] = {}
    specs: list[TensorSpec] = []
    for name, entry in src.entries.items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            specs.append(TensorSpec(name, entry.dtype, entry.shape))
            continue
        scheme = other if "down_proj" in module else W4
        if entry.shape[1] % (scheme.group_size or 1):
            scheme = Scheme(scheme.bits, None)
        schemes[module] = scheme
        weight = src.read(name)
        grouped = weight.reshape(len(weight), scheme.groups(entry.shape[1]), -1)
        scale = (grouped.abs().amax(-1) / (2 ** (scheme.bits - 1) - 0.5)).bfloat16()
        args = QuantizationScheme.model_validate(quantization_config({module: scheme}, [])["config_groups"]["group_0"])
        state = compressor.compress({"weight": weight, "weight_scale": scale}, args)
        # The scales are stored in bfloat16, and cast to the model's float32 before they multiply.
        dense[name] = compressor.decompress(state | {"weight_scale": scale.float()}, args)["weight"]
        specs += packed_specs(module, entry.shape, scheme, "BF16")
        packed |= {f"{module}.{part}": value for part, value in state.items()}
    draft = Draft(tmp_path / "out")
    draft.declare(specs)
    for spec in specs:
        if spec.name in packed:
            draft.write(spec.name, packed[spec.name])
        else:
            draft.copy(spec.name, src)
    draft.carry(src)
    draft.edit_config({"quantization_config": quantization_config(schemes, ["lm_head"])})
    draft.seal({})
    tokens = torch.arange(1, 40)[None]
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    rounded = AutoModelForCausalLM.from_pretrained(src.path)
    rounded.load_state_dict(dense, strict=False)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, rounded(tokens).logits)
    assert json.loads((tmp_path / "out/config.json").read_text())["rope_theta"] == 10000.0
