"""A prompt as PEFT stores it: what is written, and what is taken for one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rewright.formats.errors import FormatError
from rewright.formats.peft import (
    CONFIG,
    EMBEDS,
    FOLDER,
    TENSOR,
    WEIGHTS,
    Base,
    Depth,
    Heads,
    attached,
    files,
    found_in,
    read_adapter,
)

BASE = Base(width=8, rows=100, checksum="ab" * 32)
LLAMA = {
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "model_type": "llama",
}
# name -> (config, layers, heads of keys, their width)
SHAPES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "llama": (LLAMA, (3, 2, 2)),
    "no shared heads": ({key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}, (3, 4, 2)),
    "a width of heads": ({**LLAMA, "head_dim": 16}, (3, 2, 16)),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "model_type": "gpt2"}, (2, 4, 8)),
    "a part of a larger model": ({"text_config": LLAMA, "vision_config": {"hidden_size": 99}}, (3, 2, 2)),
    "falcon, one for all": ({**LLAMA, "model_type": "falcon", "multi_query": True}, (3, 1, 2)),
    "falcon, as it is by default": ({"model_type": "falcon", **{k: LLAMA[k] for k in list(LLAMA)[:3]}}, (3, 1, 2)),
    "falcon, each its own": ({**LLAMA, "model_type": "falcon", "multi_query": False, "num_kv_heads": 4}, (3, 4, 2)),
}


def _write(folder: Path, tensor: torch.Tensor, depth: Depth = "input", config: dict[str, Any] | None = None) -> Path:
    """Attach a prompt to a folder."""
    made = files(depth, *tensor.shape, tensor.numpy().tobytes(), BASE, "stories.txt", config or LLAMA)
    for name, data in made.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    return folder / FOLDER


@pytest.mark.parametrize("depth", ["input", "all"])
def test_what_is_written_is_read(depth: Depth, tmp_path: Path) -> None:
    width = 8 if depth == "input" else 3 * 2 * 2 * 2
    tensor = torch.randn(5, width)
    folder = _write(tmp_path, tensor, depth)
    names = [CONFIG, WEIGHTS] if depth == "all" else [CONFIG, WEIGHTS, EMBEDS]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    for name in names[1:]:
        assert torch.equal(load_file(folder / name)[TENSOR], tensor), "safetensors reads it"
    for place in (tmp_path, folder, folder / WEIGHTS):
        adapter = read_adapter(place)
        assert (adapter.depth, adapter.tokens, adapter.width, adapter.base) == (depth, 5, width, BASE)
        assert adapter.learned == "stories.txt"
    assert attached(tmp_path) == folder / WEIGHTS
    assert attached(folder) is None
    # equal prompts give equal bytes
    again = _write(tmp_path / "again", tensor, depth)
    assert all((again / name).read_bytes() == (folder / name).read_bytes() for name in names)


@pytest.mark.parametrize(("config", "shape"), SHAPES.values(), ids=SHAPES)
def test_peft_reads_the_config(config: dict[str, Any], shape: tuple[int, int, int], tmp_path: Path) -> None:
    """And what it makes of keys and values: heads of a width for every layer."""
    heads = Heads.of(config)
    assert (heads.layers, heads.count, heads.width) == shape
    assert heads.numbers == 2 * math.prod(shape)
    for depth, width in (("input", 8), ("all", heads.numbers)):
        folder = _write(tmp_path / depth, torch.zeros(5, width), depth, config)  # type: ignore[arg-type] # a word
        read = PeftConfig.from_pretrained(str(folder))
        assert (read.num_virtual_tokens, read.task_type, read.inference_mode) == (5, "CAUSAL_LM", True)
        assert read.num_layers == heads.layers
        assert not read.base_model_name_or_path, "whoever loads it says where the base is"
        if depth == "all":
            assert (read.num_attention_heads, read.token_dim) == (heads.count, heads.count * heads.width)
            assert read.prefix_projection is False
        else:
            assert read.token_dim == 8
    assert str(tmp_path) not in (tmp_path / "all" / FOLDER / CONFIG).read_text()


def test_what_others_leave_out(tmp_path: Path) -> None:
    """A file alone is a prompt of embeddings; one that PEFT wrote says nothing of its base."""
    save_file({TENSOR: torch.zeros(3, 4, dtype=torch.bfloat16)}, tmp_path / "p.safetensors", metadata={"format": "pt"})
    adapter = read_adapter(tmp_path / "p.safetensors")
    assert (adapter.depth, adapter.tokens, adapter.width, adapter.base, adapter.learned) == ("input", 3, 4, None, "")
    save_file({TENSOR: torch.zeros(3, 4)}, tmp_path / EMBEDS)
    assert read_adapter(tmp_path).source.path == tmp_path / EMBEDS
    (tmp_path / CONFIG).write_text('{"peft_type": "PREFIX_TUNING", "unknown": 1}')
    assert read_adapter(tmp_path).depth == "all"


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"base_width": "8", "base_rows": "100"},
        {"base_width": "8", "base_rows": "x", "base_embedding": "ab"},
        {"base_width": "-8", "base_rows": "100", "base_embedding": "ab"},
        {"base_width": "8", "base_rows": "100", "base_embedding": ""},
    ],
)
def test_a_base_that_is_not_told_whole(told: dict[str, str]) -> None:
    assert Base.read(told) is None
    assert Base.read(BASE.told()) == BASE


def test_the_header_has_what_servers_and_we_want(tmp_path: Path) -> None:
    folder = _write(tmp_path, torch.zeros(2, 8))
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert file.metadata() == {**BASE.told(), "format": "pt", "learned": "stories.txt"}
        assert list(file.keys()) == [TENSOR]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON|nested"),
        ("[]", "is of type `None`"),
        ("{}", "is of type `None`, not one of PROMPT_TUNING, PREFIX_TUNING"),
        ('{"peft_type": "LORA"}', "is of type `LORA`, not one of"),
        ('{"peft_type": ["PROMPT_TUNING"]}', "is of type"),
    ],
)
def test_other_adapters(config: str, told: str, tmp_path: Path) -> None:
    folder = _write(tmp_path, torch.zeros(2, 8))
    (folder / CONFIG).write_text(config)
    with pytest.raises(FormatError, match=told):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({}, "has no tensor `prompt_embeddings`"),
        ({"embedding": torch.zeros(2, 8)}, "has no tensor `prompt_embeddings`"),
        ({TENSOR: torch.zeros(8)}, r"is F32 \[8\], not rows of floats"),
        ({TENSOR: torch.zeros(0, 8)}, r"is F32 \[0, 8\], not rows of floats"),
        ({TENSOR: torch.zeros(2, 8, dtype=torch.float64)}, r"is F64 \[2, 8\], not rows of floats"),
        ({TENSOR: torch.zeros(2, 8, dtype=torch.int8)}, r"is I8 \[2, 8\], not rows of floats"),
    ],
)
def test_files_that_are_no_prompt(tensors: dict[str, torch.Tensor], told: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "p.safetensors")
    with pytest.raises(FormatError, match=told):
        read_adapter(tmp_path / "p.safetensors")


def test_damage_and_absence(tmp_path: Path) -> None:
    folder = _write(tmp_path, torch.zeros(2, 8))
    whole = (folder / WEIGHTS).read_bytes()
    for data in (b"", whole[:7], whole[:-1], whole.replace(b'"F32"', b'"F23"')):
        (folder / WEIGHTS).write_bytes(data)
        with pytest.raises(FormatError):
            read_adapter(tmp_path)
    with pytest.raises(FormatError, match="is not there"):
        read_adapter(tmp_path / "none.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="has no prompt") as refused:
        found_in(tmp_path / "empty")
    assert "`attachments/prompt/`" in str(refused.value.hint)
    assert found_in(tmp_path / "none") == tmp_path / "none"
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(tmp_path / "gone")
    assert attached(tmp_path) == folder / WEIGHTS, "a link that leads nowhere is no reason to go on without"
    with pytest.raises(FormatError):
        read_adapter(tmp_path)


def test_config_is_json_in_order(tmp_path: Path) -> None:
    text = (_write(tmp_path, torch.zeros(2, 8)) / CONFIG).read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
