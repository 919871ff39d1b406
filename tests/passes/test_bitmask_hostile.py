"""Checkpoints in the bitmask form that are damaged or made up: one clear line, from our readers and in transformers."""

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

from rewright.formats.errors import Refusal
from rewright.passes.loading import load, register
from tests.passes.compressing import compress
from tests.passes.conftest import STORIES
from tests.passes.forks import Forks

MODULE = "model.layers.1.mlp.up_proj"
Edit = Callable[[dict[str, torch.Tensor]], Any]


@pytest.fixture(scope="module")
def sound(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sound") / "out"
    compress(tiny("llama"), out, format="bitmask-w4", pattern="8:16", method="rtn")
    (out / "rewright.json").unlink()
    return out


def _changed(sound: Path, folder: Path, edit: Edit) -> Path:
    shutil.copytree(sound, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _put(leaf: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return lambda tensors: tensors.update({f"{MODULE}.{leaf}": value(tensors[f"{MODULE}.{leaf}"])})


def _less_one(mask: torch.Tensor) -> torch.Tensor:
    """One column fewer in one group."""
    mask[3, 1, 0] &= mask[3, 1, 0] - 1
    return mask


DAMAGE: dict[str, tuple[Edit, str]] = {
    "a mask cut short": (_put("weight_mask", lambda t: t[..., :1]), "weight_mask"),
    "a mask of other rows": (_put("weight_mask", lambda t: t[:-1]), "weight_mask"),
    "a mask of words": (_put("weight_mask", lambda t: t.int()), "weight_mask"),
    "a mask of one bit less": (_put("weight_mask", _less_one), "weight_mask"),
    "a mask of all": (_put("weight_mask", lambda t: torch.full_like(t, 255)), "weight_mask"),
    "codes cut short": (_put("weight", lambda t: t[..., :-1]), f"{MODULE}.weight"),
    "codes of numbers": (_put("weight", lambda t: t.float()), f"{MODULE}.weight"),
    "no codes": (lambda t: t.pop(f"{MODULE}.weight"), f"{MODULE}.weight"),
    "no mask": (lambda t: t.pop(f"{MODULE}.weight_mask"), f"{MODULE}.weight"),
    "no scale": (lambda t: t.pop(f"{MODULE}.weight_scale"), "weight_scale"),
    "no shape": (lambda t: t.pop(f"{MODULE}.weight_shape"), "weight_shape"),
    "scales of 32 bits": (_put("weight_scale", lambda t: t.float()), "F32"),
    "scales of other groups": (_put("weight_scale", lambda t: t[:, :1]), "weight_scale"),
    "a scale that is no number": (_put("weight_scale", lambda t: t.fill_(torch.nan)), MODULE),
    "a shape of one number": (_put("weight_shape", lambda t: t[:1]), "weight_shape"),
    "a negative shape": (_put("weight_shape", lambda t: -t), "weight_shape"),
    "an enormous shape": (_put("weight_shape", lambda t: t << 40), MODULE),
    "a shape the other way round": (_put("weight_shape", lambda t: t.flip(0)), MODULE),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("packed", [False, True], ids=["decoded", "packed"])
def test_damage_is_named(kind: str, packed: bool, sound: Path, tmp_path: Path) -> None:
    edit, named = DAMAGE[kind]
    with pytest.raises(Refusal) as refusal:
        load(_changed(sound, tmp_path / "bad", edit), torch.float32, packed=packed)
    assert named in refusal.value.message
    assert "\n" not in refusal.value.message


# what transformers does not look at, or takes as it is for any weight
TAKEN = ("a scale that is no number", "a negative shape", "an enormous shape", "a shape the other way round")


@pytest.mark.parametrize("kind", [kind for kind in DAMAGE if kind not in TAKEN])
def test_damage_stops_transformers_too(kind: str, sound: Path, tmp_path: Path) -> None:
    register()
    edit, named = DAMAGE[kind]
    with pytest.raises(Refusal, match=named):
        AutoModelForCausalLM.from_pretrained(_changed(sound, tmp_path / "bad", edit))


CONFIGS: dict[str, dict[str, Any]] = {
    "group_size": {"group_size": "large"},
    "nnz": {"nnz": 7},
    "ignore": {"ignore": {"lm_head": True}},
    "modules": {"modules": {MODULE: {"group_size": 16}}},
    "format": {"format": "bitmask-w2"},
}


@pytest.mark.parametrize("key", [*CONFIGS, "another record", "an ignored module"])
def test_a_config_that_cannot_be_meant(key: str, sound: Path, tmp_path: Path) -> None:
    changes = {"another record": {"nnz": 4}, "an ignored module": {"ignore": ["lm_head", MODULE]}, **CONFIGS}[key]
    bad = Path(shutil.copytree(sound, tmp_path / "bad"))
    config = json.loads((bad / "config.json").read_text())
    config["quantization_config"] |= changes
    (bad / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal) as refusal:
        load(bad, torch.float32)
    assert "\n" not in refusal.value.message
    register()
    with pytest.raises(Refusal):
        AutoModelForCausalLM.from_pretrained(bad)


def test_a_config_that_was_lost(sound: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(sound, tmp_path / "bad"))
    config = json.loads((bad / "config.json").read_text())
    del config["quantization_config"]
    (bad / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal, match="a weight with a scale of its own"):
        load(bad, torch.float32)


@pytest.mark.parametrize("kind", ["a mask cut short", "a mask of one bit less"])
def test_the_command_line_says_it_in_a_line(kind: str, forks: Forks, sound: Path, tmp_path: Path) -> None:
    bad = _changed(sound, tmp_path / "bad", DAMAGE[kind][0])
    ended = forks.run("eval", bad, "--text", STORIES.parent / "tinystories.txt")
    assert ended.code == 3, ended.err
    assert f"`{MODULE}.weight_mask`" in ended.err.splitlines()[0]
    assert "Traceback" not in ended.err
